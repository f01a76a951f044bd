"""Kernels on 16-bit arrays: each is the float32 kernel of the same numbers, rounded once; sums stay float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcmp import kernels
from hpcmp.arrays import Array, dtype_of, is_half, wide
from hpcmp.kernels import update
from hpcmp.kernels.half import EXACT, OVERWRITTEN, ROUNDED
from tests.kernels.test_kernels import CALLS, SETTINGS, Sizes

HALVES = [dtype_of("bfloat16"), dtype_of("float16")]

#: How many of a kernel's first arguments, which it adds to in place, stay float32.
IN_PLACE = {"add_square_sum": 1, "add_outer": 1, "add_rows": 1, "add_outer_and_rows": 2, "embedding_backward_weight": 1}
IN_PLACE |= {"add_amax": 1, "fp8_product": 1, "shift_history": 4}

#: Kernels made of two, which round in between.
ROUNDED_TWICE = {"matmul_onto", "matmul_gelu", "matmul_gelu_backward"}
ELSEWHERE = {"assign", *ROUNDED_TWICE}  # tested by themselves


def cast(arguments: list[Any], dtype: Any) -> list[Any]:
    """The arguments with their float arrays in another dtype, but for sums in double precision."""
    return [v.astype(dtype) if isinstance(v, np.ndarray) and _is_float(v) else v for v in arguments]


def _is_float(x: Array) -> bool:
    return x.dtype == np.float32 or is_half(x.dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [(5, 11), (64, 33), (3, 0), (0, 4)])
@pytest.mark.parametrize("name", [name for name in CALLS if not hasattr(update, name) and name not in ELSEWHERE])
def test_a_kernel_is_that_of_float32_rounded_once(name: str, size: tuple[int, int], dtype: Any) -> None:
    targets = IN_PLACE.get(name, 0)
    arguments = CALLS[name](Sizes(*size, np.float32))
    arguments[targets:] = cast(arguments[targets:], dtype)
    wide = cast(arguments, np.float32)
    before = [v.copy() if isinstance(v, np.ndarray) else v for v in arguments]
    found, expected = (
        getattr(kernel_set, name)(*given, **SETTINGS.get(name, {}))
        for kernel_set, given in ((kernels.CPU_HALF, arguments), (kernels.CPU, wide))
    )
    for i, (y, z) in enumerate(zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected)), strict=True)):
        if isinstance(z, np.ndarray) and _is_float(z) and i in ROUNDED.get(name, range(9)):
            z = z.astype(dtype)
        assert np.asarray(y).dtype == np.asarray(z).dtype
        np.testing.assert_array_equal(y, z)
    for i, (now, was, z) in enumerate(zip(arguments, before, wide, strict=True)):
        over = i == OVERWRITTEN.get(name)
        expected = z.astype(dtype) if over else z if i < targets else was  # what is added to, and what is left alone
        np.testing.assert_array_equal(now, expected)
        assert not over or found is now


@pytest.mark.parametrize("source", [*HALVES, np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("dtype", [*HALVES, np.dtype(np.float32)], ids=str)
def test_an_assignment_rounds_once(dtype: Any, source: Any) -> None:
    x = np.random.default_rng(0).normal(size=(3, 70)).astype(source)
    target = np.empty(x.shape, dtype)
    kernels.of(target).assign(target, x)
    np.testing.assert_array_equal(target, x.astype(np.float32).astype(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_kernel_made_of_two_is_these(dtype: Any) -> None:
    k = kernels.CPU_HALF
    x, w, bias = (np.random.default_rng(0).normal(size=shape).astype(dtype) for shape in ((9, 5), (5, 8), 8))
    z = k.matmul(x, w, bias)
    for found, expected in zip(k.matmul_gelu(x, w, bias), (k.gelu(z), z), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(k.matmul_onto(x, w, -z, bias), k.add(-z, z))
    dy = k.matmul(z, w.T)
    expected = k.gelu_backward(k.matmul_transposed(dy, w.T), z)
    np.testing.assert_array_equal(k.matmul_gelu_backward(dy, w.T, z), expected)


def test_sums_of_many_are_not_stuck() -> None:
    """1000 ones: in bfloat16 256 + 1 is 256."""
    one = np.ones((1000, 1), HALVES[0])
    assert kernels.of(one).matmul_transposed(one.T, one.T) == 1000
    grad = np.zeros((1, 1), np.float32)
    kernels.of(one).add_outer(grad, one, one)
    assert grad == 1000
    assert kernels.of(one).square_sum(one) == 1000.0


def test_adding_up_in_16_bits_is_refused() -> None:
    one = np.ones((3, 1), HALVES[0])
    with pytest.raises(TypeError, match="add_outer: adding up in bfloat16"):
        kernels.of(one).add_outer(np.zeros((1, 1), HALVES[0]), one, one)


def test_the_set_for_an_array() -> None:
    for dtype in HALVES:
        assert kernels.of(np.zeros(3, dtype)) is kernels.CPU_HALF
    for dtype in (np.float32, np.float64, np.int16):
        assert kernels.of(np.zeros(3, dtype)) is kernels.CPU
    assert all(hasattr(kernels.CPU, name) for name in EXACT | set(ROUNDED))
    with pytest.raises(AttributeError, match="no kernel 'adamw'"):
        _ = kernels.CPU_HALF.adamw


def test_dtypes() -> None:
    assert [wide(d) for d in (*HALVES, "float32", "float64")] == [np.float32, np.float32, np.float32, np.float64]
    assert [is_half(d) for d in (*HALVES, "float32", "int16")] == [True, True, False, False]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_large_numbers_stay_finite(dtype: Any) -> None:
    x: Array = np.array([-1e4, -90, 0, 90, 1e4]).astype(dtype)
    y, _, rstd = kernels.of(x).layer_norm(x, np.ones_like(x), np.zeros_like(x), 1e-5)  # x^2 overflows float16
    assert np.isfinite(y.astype(np.float32)).all() and rstd > 0
