"""Token and position embeddings."""

from __future__ import annotations

import numpy as np
import pytest

from hpcmp import wgrad
from hpcmp.arrays import Array
from hpcmp.layers.embedding import LearnedPositions, VocabularyParallelEmbedding
from hpcmp.layers.linear import ParallelHead
from hpcmp.layers.norm import RMSNorm
from hpcmp.layers.parallel import ModelParallel
from hpcmp.module import Module, Parameter, Sequential, normal
from hpcmp.testing import share, whole

from .common import BATCH, Case, place


def tokens(vocabulary: int, length: int) -> Array:
    """Token numbers; with a small vocabulary most occur often."""
    return np.random.default_rng(vocabulary).integers(0, vocabulary, (length, BATCH))


def table(p: ModelParallel, vocabulary: int) -> Parameter:
    return p.sharded(vocabulary, 6, axis=0, initial=normal(0.3), name="table")


def embedding(vocabulary: int) -> Case:
    return Case(
        lambda p: VocabularyParallelEmbedding(p, table(p, vocabulary)),
        layout="IA",
        cut_x=whole,
        x=lambda length: tokens(vocabulary, length),
    )


def tied(p: ModelParallel) -> Module:
    """One table at both ends, as models have it; a norm between them whose gradient owes a sum."""
    shared = table(p, 11)
    return Sequential(VocabularyParallelEmbedding(p, shared), RMSNorm(p, 6), ParallelHead(p, shared))


CASES = {
    "embedding": embedding(1003),
    "embedding of fewer than the ranks": embedding(3),
    "positions": Case(lambda p: LearnedPositions(p, 16, 6, normal(0.3))),
    "tied": Case(tied, layout="IV", cut_x=whole, cut_y=share(2), x=lambda length: tokens(11, length)),
}


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    if name != "embedding":  # its 6,018 numbers are more than central differences are for
        CASES[name].check_serial()
    CASES[name].check_dtype()
    CASES[name].check_weight_gradients()


@pytest.mark.mpi
@pytest.mark.parametrize("name", CASES)
def test_layouts(parallel: ModelParallel, name: str) -> None:
    CASES[name].check_equal(parallel)


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["embedding of fewer than the ranks", "tied"])
def test_gradients_on_ranks(parallel: ModelParallel, name: str) -> None:
    CASES[name].check_gradients(parallel)


@pytest.mark.mpi
def test_an_embedding_is_its_row_to_the_last_bit(parallel: ModelParallel) -> None:
    """The sum over ranks has one term that is not zero."""
    module = VocabularyParallelEmbedding(parallel, table(parallel, 11))
    serial = VocabularyParallelEmbedding(place(5), table(place(5), 11))
    for m in (module, serial):
        m.initialise(3, np.float32)
    x = tokens(11, parallel.cursor.place.length)
    np.testing.assert_array_equal(module.forward(x)[0], serial.table.data[x[parallel.positions()]])


def test_repeated_tokens_add_up() -> None:
    module = VocabularyParallelEmbedding(place(3), table(place(3), 4))
    module.initialise(0, np.float64)
    x = np.array([[1, 1], [3, 1], [0, 0]])
    y, saved = module.forward(x)
    module.backward(np.ones_like(y), saved, wgrad.now)
    np.testing.assert_array_equal(module.table.grad, np.repeat([[2.0], [3.0], [0.0], [1.0]], 6, 1))


def test_positions_beyond_the_sequence_stay_untouched() -> None:
    module = LearnedPositions(place(5), 16, 6)
    module.initialise(0, np.float64)
    y, saved = module.forward(np.zeros((5, BATCH, 6)))
    np.testing.assert_array_equal(y, np.repeat(module.weight.data[:5, None], BATCH, 1))
    module.backward(np.ones_like(y), saved, wgrad.now)
    np.testing.assert_array_equal(module.weight.grad[:5], np.full((5, 6), BATCH))
    assert not module.weight.grad[5:].any()
