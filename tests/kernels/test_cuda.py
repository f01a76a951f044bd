"""Every CUDA kernel, through its wrapper, on the CPU: against the reference in double precision, in every type.

tests/gpu has the same cases on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcmp import kernels
from hpcmp.kernels import reference
from hpcmp.kernels.half import OVERWRITTEN
from hpcmp.random import DropoutMask, bits
from tests.kernels.cuda_cases import (
    CASES,
    DTYPES,
    KERNELS,
    arguments_of,
    case,
    check,
    check_dtypes,
    expected_of,
    kernel_set,
)
from tests.kernels.emulation.backend import emulated, needs_gxx
from tests.kernels.test_kernels import SETTINGS, SIZES, lay

pytestmark = [needs_gxx, pytest.mark.timeout(300)]  # g++ builds what has changed


def compare(name: str, arguments: list[Any], dtype: Any, contiguous: bool = True) -> None:
    """A kernel, on NumPy arrays, against the reference."""
    expected = expected_of(name, arguments)
    given = [lay(value, contiguous) for value in arguments]
    with emulated():
        result = getattr(kernel_set(dtype), name)(*given, **SETTINGS.get(name, {}))
    results = list(result) if isinstance(result, tuple) else [] if result is None else [result]
    check_dtypes(name, results, dtype)
    if name in OVERWRITTEN:
        assert results[0] is given[OVERWRITTEN[name]]
    check(name, [*results, *(v for v in given if isinstance(v, np.ndarray))], expected, dtype)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "dtype"), KERNELS, ids=str)
def test_a_kernel_does_as_the_reference_in_double_precision(
    name: str, dtype: Any, size: tuple[int, int], contiguous: bool
) -> None:
    compare(name, arguments_of(name, size, dtype), dtype, contiguous)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_where_something_changes(name: str, dtype: Any) -> None:
    kernel, arguments = case(name, dtype, 0)
    compare(kernel, arguments, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_aligned_gives_the_same_bits(dtype: Any) -> None:
    """Rows that begin between 16-byte boundaries are read number by number, and added up in the same order."""
    draw = np.random.default_rng(0)
    whole = draw.normal(size=(6 * 512 + 1)).astype(dtype)
    x, moved = whole[:-1].reshape(6, 512).copy(), np.empty_like(whole)[1:].reshape(6, 512)
    moved[...] = x
    assert (x.ctypes.data % 16, moved.ctypes.data % 16) == (0, dtype.itemsize)
    w = draw.normal(size=512).astype(dtype)
    k = kernel_set(dtype)
    with emulated():
        for a, b in zip(k.layer_norm(x, w, w, 1e-5), k.layer_norm(moved, w, w, 1e-5), strict=True):
            np.testing.assert_array_equal(a, b)
        for of in (k.gelu, k.square_sum, lambda x: k.add(x, x), lambda x: k.swiglu(x.reshape(3, 2, 512))):
            np.testing.assert_array_equal(of(x), of(moved))


def test_a_sum_over_several_ranks_is_the_references() -> None:
    """Where ``means`` are given, of 16 bits too."""
    asked = []

    def means(*xs: Any) -> list[Any]:
        asked.append([x.dtype for x in xs])
        return reference._means(*xs)

    for dtype in DTYPES:
        (x, w, b), wide = np.random.default_rng(0).normal(size=(3, 7, 7)).astype(dtype), kernels.NUMPY_HALF
        k = kernel_set(dtype)
        with emulated():
            y, mean, rstd = k.layer_norm(x, w[0], b[0], 1e-5, means)
            dx = k.layer_norm_backward(y, x, w[0], mean, rstd, means=means, onto=b)
            assert k.rms_norm(x, w[0], 1e-5, means=means)[0].dtype == dx.dtype == y.dtype == dtype
        if dtype.itemsize == 2:
            np.testing.assert_array_equal(y, wide.layer_norm(x, w[0], b[0], 1e-5)[0])
        else:
            np.testing.assert_array_equal(dx, reference.layer_norm_backward(y, x, w[0], mean, rstd, onto=b))
    assert len(asked) == 4 * len(DTYPES)
    assert {dtype for each in asked for dtype in each} == {np.dtype(np.float32), np.dtype(np.float64)}


def test_a_word_that_is_the_threshold_is_kept() -> None:
    key, i, j = (5, 6), np.arange(3)[:, None], np.arange(2)
    word = bits(key, i, j, slice(0, 16))[1, 1, 9]
    mask = DropoutMask(int(word) / 2**32, key, i, j, (slice(0, 16),))
    assert mask.threshold == word
    x = np.ones((3, 2, 16), np.float32)
    with emulated():
        y = kernels.CUDA.dropout(x, mask)
    assert y[1, 1, 9] > 0
    np.testing.assert_array_equal(y > 0, mask.keep())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_turn_wherever_they_lie(dtype: Any) -> None:
    """As an exchange of heads leaves them, and between 16-byte boundaries: the same bits, and the rest left alone."""
    draw = np.random.default_rng(0)
    x, cos, sin = (draw.normal(size=shape).astype(dtype) for shape in ((3, 2, 5, 48), (3, 1, 1, 16), (3, 1, 1, 16)))
    by_head, moved = np.moveaxis(np.moveaxis(x, 2, 0).copy(), 0, 2), np.empty(x.size + 1, dtype)[1:].reshape(x.shape)
    moved[...] = before = x.copy()
    k = kernel_set(dtype)
    with emulated():
        for each in (x, by_head, moved):
            assert k.rope(each, cos, sin) is each
            np.testing.assert_array_equal(each, x)
    assert (x[..., :32] != before[..., :32]).any() and (x[..., 32:] == before[..., 32:]).all()
