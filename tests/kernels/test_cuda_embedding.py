"""The CUDA kernels of an embedding, and of moving rows, on the CPU: what the cases of every kernel leave out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcmp import kernels
from hpcmp.arrays import dtype_of
from tests.kernels.emulation.backend import emulated, needs_gxx

pytestmark = [needs_gxx, pytest.mark.timeout(300)]  # g++ builds what has changed

DTYPES = [dtype_of(name) for name in ("bfloat16", "float16", "float32", "float64")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 13, 4100])
def test_rows_are_taken_as_they_are(width: int, dtype: Any) -> None:
    draw = np.random.default_rng(width)
    table, ids = draw.normal(size=(6, width)).astype(dtype), draw.integers(-3, 12, (3, 11))
    with emulated():
        found = kernels.CUDA_HALF.embedding(table, ids, 2)
    np.testing.assert_array_equal(found, kernels.REFERENCE.embedding(table, ids, 2))
    assert found.dtype == dtype and found.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frequent", [5, 75, 700])
@pytest.mark.parametrize("width", [1, 16, 2100])
def test_a_row_of_the_gradient_adds_up_its_tokens_in_their_order(width: int, frequent: int, dtype: Any) -> None:
    """To the last bit, where numbers are of very different sizes, also of 16 bits; in pieces that end where a token's
    place among all, sorted by rows, is a multiple of 64, and of which those after the first are added up apart."""
    draw = np.random.default_rng(width)
    wide = np.promote_types(dtype, np.float32)
    ids = np.concatenate([draw.integers(0, 9, 40), np.full(frequent, 4), [7], draw.integers(0, 9, 8)])
    dy = (10 ** draw.uniform(-3, 3, (len(ids), width)) * draw.choice([-1, 1], (len(ids), width))).astype(dtype)
    offset = width % 3  # a parameter may begin anywhere in a bucket
    before = draw.normal(size=5 * width + offset).astype(wide)[offset:].reshape(5, width)
    expected = before.copy()
    rows = np.where((ids >= 2) & (ids < 7), ids - 2, 5)
    order = np.argsort(rows, kind="stable")
    for row in range(5):
        places = np.flatnonzero(rows[order] == row)
        first, *others = (places[places // 64 == piece] for piece in range(places[0] // 64, places[-1] // 64 + 1))
        sums = [np.zeros(width, wide) for _ in (first, *others)]
        for total, piece in zip(sums, (first, *others), strict=True):
            for place in piece:
                total += dy[order[place]].astype(wide)
        expected[row] += sums[0]
        if others:
            expected[row] += sum(sums[1:], np.zeros(width, wide))
    with emulated():
        kernels.CUDA_HALF.embedding_backward_weight(before, ids, 2, dy)
    np.testing.assert_array_equal(before, expected)


def test_what_is_not_this_ranks_changes_nothing() -> None:
    grad = np.ones((4, 6), np.float32)
    with emulated():
        for ids in np.array([0, 1, 99]), np.zeros(0, np.int64):
            kernels.CUDA.embedding_backward_weight(grad, ids, 10, np.ones((len(ids), 6), np.float32))
        kernels.CUDA.embedding_backward_weight(grad[:0], np.array([1]), 0, np.ones((1, 6), np.float32))
    assert (grad == 1).all()


def test_a_gradient_of_16_bits_is_refused() -> None:
    half = np.ones((4, 6), DTYPES[0])
    with pytest.raises(TypeError, match="embedding_backward_weight: adding up in bfloat16"):
        kernels.CUDA_HALF.embedding_backward_weight(half, np.array([1]), 0, half[:1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_there_and_back(dtype: Any) -> None:
    """A permutation with gaps, and its inverse; a scale is applied before the one rounding."""
    draw = np.random.default_rng(5)
    x, order = draw.normal(size=(9, 21)).astype(dtype), draw.permutation(9)[:6]
    inverse = np.full(9, -1)
    inverse[order] = np.arange(6)
    scale = draw.normal(size=6).astype(dtype)
    with emulated():
        k = kernels.CUDA_HALF
        there = k.take_rows(x, order)
        back = k.take_rows(there, inverse)
        scaled = k.take_rows(x, order, scale)
        assert k.take_rows(x[:0], inverse).tolist() == [[0.0] * 21] * 9
    np.testing.assert_array_equal(there, x[order])
    np.testing.assert_array_equal(back, np.where(inverse[:, None] >= 0, x, np.zeros_like(x)))
    wide = np.promote_types(dtype, np.float32)
    np.testing.assert_array_equal(scaled, (x[order].astype(wide) * scale[:, None].astype(wide)).astype(dtype))
