"""Cross-entropy over a vocabulary that is sharded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcmp import wgrad
from hpcmp.arrays import Array
from hpcmp.comm.base import Communicator
from hpcmp.layers.loss import VocabularyParallelCrossEntropy
from hpcmp.layers.parallel import ModelParallel
from hpcmp.module import Sequential
from hpcmp.testing import share, whole

from .common import BATCH, Case, Copied, draw, place


def inputs(vocabulary: int, length: int) -> tuple[Array, Array]:
    """Logits, and targets of which some are ignored."""
    return 3 * draw(length, BATCH, vocabulary), np.random.default_rng(1).integers(-1, vocabulary, (length, BATCH))


def cut(x: Any, parallel: ModelParallel) -> Any:
    """This rank's share of the logits, and of their gradient; whole targets."""
    return (share(2)(x[0], parallel), x[1])


def case(vocabulary: int) -> Case:
    return Case(
        lambda p: Sequential(Copied(), VocabularyParallelCrossEntropy(p, vocabulary)),
        layout="VI",
        cut_x=cut,
        cut_y=whole,
        x=lambda length: inputs(vocabulary, length),
    )


CASES = {"1003": case(1003), "7": case(7), "fewer than the ranks": case(2)}


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    CASES[name].check_serial()
    CASES[name].check_dtype()


@pytest.mark.mpi
@pytest.mark.parametrize("name", CASES)
def test_layouts(parallel: ModelParallel, name: str) -> None:
    CASES[name].check_equal(parallel)


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["7", "fewer than the ranks"])
def test_gradients_on_ranks(parallel: ModelParallel, name: str) -> None:
    CASES[name].check_gradients(parallel)


@pytest.mark.mpi
@pytest.mark.parametrize("vocabulary", [1003, 7, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_is_the_sum_of_minus_log_softmax(tp: Communicator, vocabulary: int, dtype: Any) -> None:
    logits, targets = inputs(vocabulary, 5)
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -sum(np.log(probability[i][targets[i]]) for i in np.ndindex(targets.shape) if targets[i] >= 0)
    parallel = place(5, tp)
    module = VocabularyParallelCrossEntropy(parallel, vocabulary)
    x = cut((logits.astype(dtype), targets), parallel)
    loss, saved = module.forward(x)
    tolerance = 1e-5 if dtype == np.float32 else 1e-13
    assert np.ndim(loss) == 0 and np.asarray(loss).dtype == np.float64
    np.testing.assert_allclose(loss, expected, rtol=tolerance)
    dx, nothing = module.backward(0.25, saved, wgrad.now)
    one_hot = targets[..., None] == np.arange(vocabulary)
    gradient = 0.25 * (probability - one_hot) * (targets >= 0)[..., None]
    np.testing.assert_allclose(dx, share(2)(gradient, parallel), rtol=0, atol=tolerance)
    assert nothing is None and dx.dtype == dtype
    assert dx is x[0]  # in the place of the logits: there is no second array of their size


@pytest.mark.mpi
def test_extreme_logits_in_single_precision(tp: Communicator) -> None:
    """+-10,000: no overflow; where the target has the largest the loss is 0, and elsewhere the difference."""
    parallel = place(3, tp)
    logits = np.full((3, 1, 9), -1e4, np.float32)
    logits[:, 0, 4] = 1e4
    targets = np.array([[4], [8], [-1]])
    module = VocabularyParallelCrossEntropy(parallel, 9)
    loss, saved = module.forward(cut((logits, targets), parallel))
    assert loss == 2e4
    dx, _ = module.backward(1.0, saved, wgrad.now)
    expected = np.zeros((3, 1, 9))
    expected[1, 0, 4], expected[1, 0, 8] = 1, -1
    np.testing.assert_array_equal(dx, share(2)(expected, parallel))


@pytest.mark.mpi
def test_ignored_everywhere_is_zero(tp: Communicator) -> None:
    parallel = place(5, tp)
    logits, targets = inputs(7, 5)
    module = VocabularyParallelCrossEntropy(parallel, 7)
    loss, saved = module.forward(cut((logits, np.full_like(targets, -1)), parallel))
    assert loss == 0
    assert not module.backward(1.0, saved, wgrad.now)[0].any()
