"""Dropout: its masks are those of the serial run, wherever they are drawn."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from hpcmp import random, wgrad
from hpcmp.arrays import Array
from hpcmp.layers.dropout import Dropout
from hpcmp.layers.linear import ColumnParallelLinear, Output, RowParallelLinear
from hpcmp.layers.parallel import ModelParallel
from hpcmp.module import Module, Recompute, Residual, normal

from .common import BATCH, Case, draw, place


def block(p: ModelParallel) -> Module:
    return Residual(
        ColumnParallelLinear(p, 6, {"weight": Output((7,))}, initial=normal(0.3)),
        RowParallelLinear(p, (7,), 6, bias=True, initial=normal(0.3)),
        Dropout(p, 6, 0.4, "block"),
    )


CASES = {
    "dropout": Case(lambda p: Dropout(p, 6, 0.4, "d")),
    "dropout of nothing": Case(lambda p: Dropout(p, 6, 0.0, "d")),
    "block": Case(block),
    "recomputed": Case(lambda p: Recompute(block(p))),
}


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    CASES[name].check_serial()
    CASES[name].check_dtype()
    CASES[name].check_weight_gradients()


@pytest.mark.mpi
@pytest.mark.parametrize("name", CASES)
def test_layouts(parallel: ModelParallel, name: str) -> None:
    CASES[name].check_equal(parallel)


@pytest.mark.mpi
def test_the_mask_is_the_serial_one(parallel: ModelParallel) -> None:
    length = parallel.cursor.place.length
    ones = np.ones((length, BATCH, 6))
    whole = Dropout(place(length), 6, 0.4, "d").forward(ones)[0]
    np.testing.assert_array_equal(
        Dropout(parallel, 6, 0.4, "d").forward(ones[parallel.positions()])[0], whole[parallel.positions()]
    )


def dropped(p: ModelParallel, length: int = 13, name: str = "d") -> Array:
    return Dropout(p, 6, 0.4, name).forward(np.ones((length, BATCH, 6)))[0]


def test_the_mask_is_by_position_sample_and_column() -> None:
    y, key = dropped(place(13)), random.key(11, "d", 3)
    for t, (i, sample), c in itertools.product(range(13), enumerate((7, 4)), range(6)):
        keep = random.bits(key, np.array(t), np.array(sample), slice(c, c + 1))[0] >= 0.4 * 2**32
        assert y[t, i, c] == (1 / 0.6 if keep else 0)


def test_the_mask_depends_on_the_sample_and_not_on_the_microbatch() -> None:
    y = dropped(place(13))
    swapped = dropped(place(13, samples=np.array([4, 7])))
    np.testing.assert_array_equal(swapped, y[:, ::-1])


@pytest.mark.parametrize("changes", [{"step": 4}, {"samples": np.array([8, 5])}])
def test_other_steps_and_samples_have_other_masks(changes: dict[str, Any]) -> None:
    assert (dropped(place(13, **changes)) != dropped(place(13))).mean() > 0.2


def test_other_layers_and_seeds_have_other_masks() -> None:
    assert (dropped(place(13), name="e") != dropped(place(13))).mean() > 0.2
    other = place(13)
    other.cursor.seed = 12
    assert (dropped(other) != dropped(place(13))).mean() > 0.2


def test_the_mean_is_kept() -> None:
    y = Dropout(place(200), 100, 0.4, "d").forward(np.ones((200, BATCH, 100)))[0]
    assert abs(y.mean() - 1) < 4 * np.sqrt(0.4 / 0.6 / y.size)


def test_evaluation_keeps_everything() -> None:
    module, x = Dropout(place(5, training=False), 6, 0.4, "d"), draw(5, BATCH, 6)
    y, saved = module.forward(x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(module.backward(x, saved, wgrad.now), x)


def test_recompute_draws_the_same_mask() -> None:
    x, dy = draw(5, BATCH, 6), draw(5, BATCH, 6)
    results = []
    for build in (block, lambda p: Recompute(block(p))):
        module = build(place(5))
        parameters = module.initialise(0, np.float64)
        y, saved = module.forward(x)
        results.append([y, module.backward(dy, saved, wgrad.now), *(p.grad for p in parameters)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)
