"""The CUDA kernels of cross-entropy, on the CPU: what the cases of every kernel (test_cuda.py) leave out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcmp import kernels
from hpcmp.arrays import dtype_of
from tests.kernels.emulation.backend import emulated, needs_gxx

pytestmark = [needs_gxx, pytest.mark.timeout(300)]  # g++ builds what has changed

DTYPES = [dtype_of(name) for name in ("bfloat16", "float16", "float32", "float64")]


def parts(logits: np.ndarray, targets: np.ndarray, first: int) -> list[np.ndarray]:
    with emulated():
        return list(kernels.CUDA_HALF.cross_entropy_parts(logits, targets, first))


def exact(logits: np.ndarray, targets: np.ndarray, first: int) -> list[np.ndarray]:
    return list(kernels.REFERENCE.cross_entropy_parts(logits.astype(np.float64), targets, first))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [31, 512, 4096 * 8 + 8, 40001])
def test_rows_longer_than_a_block_moves_at_once(n: int, dtype: Any) -> None:
    """The largest number anywhere in a row: the sums before it are scaled down to it."""
    draw = np.random.default_rng(n)
    logits = draw.normal(size=(5, n))
    logits[np.arange(5), [0, n // 3, n // 2, n - 2, n - 1]] += 30
    logits, targets = logits.astype(dtype), np.array([3, n + 2, 7 + n // 2, -1, n - 1])
    tolerance = 1e-12 if dtype == np.float64 else 2e-6
    for y, z in zip(parts(logits, targets, 3), exact(logits, targets, 3), strict=True):
        assert y.dtype == (np.float64 if dtype == np.float64 else np.float32)
        np.testing.assert_allclose(y, z, rtol=tolerance)


def test_minus_infinity_and_numbers_that_are_none() -> None:
    inf, nan = np.inf, np.nan
    logits = np.array([[1, -inf, 2], [-inf, -inf, -inf], [0, nan, 1], [3, inf, 1]], np.float32)
    with np.errstate(invalid="ignore"):
        top, total, chosen = parts(logits, np.array([2, 9, 0, 2]), 0)
    np.testing.assert_array_equal(top[[0, 1, 3]], [2, -inf, inf])
    np.testing.assert_allclose(total, [1 + np.exp(-1), 0, nan, nan], rtol=1e-6)
    np.testing.assert_array_equal(chosen, [2, 0, 0, 1])


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_the_logits_takes_their_place(dtype: Any, contiguous: bool) -> None:
    draw, n = np.random.default_rng(1), 40001
    wide = np.float64 if dtype == np.float64 else np.float32
    logits = draw.normal(size=(4, n)).astype(dtype)
    targets, lse = np.array([2, n + 1, -1, 60]), np.log(np.exp(logits.astype(np.float64)).sum(-1)).astype(wide)
    scale = np.array([0.5, 1.0, 0.0, 2.0], wide)
    expected = kernels.REFERENCE.cross_entropy_backward(
        scale.astype(np.float64), logits.astype(np.float64), targets, 2, lse.astype(np.float64)
    )
    given = logits if contiguous else np.repeat(logits, 2, 1)[:, ::2]
    with emulated():
        assert kernels.CUDA_HALF.cross_entropy_backward(scale, given, targets, 2, lse) is given
    ulp = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 2e-6, "float64": 1e-14}[dtype.name]
    np.testing.assert_allclose(given.astype(np.float64), expected, rtol=ulp, atol=2**-24)


def test_a_sum_has_the_same_bits_wherever_its_row_lies() -> None:
    """So that a position's loss does not depend on the microbatch that it is in."""
    row = np.random.default_rng(2).normal(size=40000).astype(np.float32)
    alone, among = (parts(np.stack([row] * count), np.zeros(count, np.int64), 0)[1] for count in (1, 7))
    assert (among == alone[0]).all()
