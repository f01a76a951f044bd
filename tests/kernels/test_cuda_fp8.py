"""CUDA's kernels for 8 bits, on the CPU: the reference's bits; products by cuBLASLt's descriptors, and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcmp.arrays import dtype_of
from hpcmp.kernels import CUDA, REFERENCE
from hpcmp.kernels.cuda import fp8, multiply
from hpcmp.kernels.cuda.choices import Choices
from hpcmp.kernels.cuda.product import Product
from hpcmp.kernels.fp8 import SUMMED
from tests.kernels.cublaslt import CublasLt, make_lt, multiplying
from tests.kernels.emulation.backend import emulated, needs_gxx

pytestmark = [needs_gxx, pytest.mark.timeout(300)]

SOURCES = [dtype_of(name) for name in ("float32", "float16", "bfloat16")]
FORMATS = ["e4m3", "e5m2"]
#: Of one tile and of several, aligned and not, with rows shorter than a pack.
SIZES = [(5, 7), (1, 1), (128, 128), (131, 260), (16, 48), (1, 513), (257, 8), (130, 132)]


def draw(dtype: Any, *shape: int) -> np.ndarray[Any, Any]:
    """Over the range of both formats, with some that are no numbers."""
    rng = np.random.default_rng(shape)
    x = (rng.normal(size=shape) * 2.0 ** rng.integers(-20, 6, shape)).astype(dtype)
    if x.size > 9:
        x.reshape(-1)[[3, 5, 8]] = np.nan, np.inf, -np.inf
    return x


def largest_of(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    largest = np.zeros(1, np.float32)
    REFERENCE.add_amax(largest, x)
    return largest


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", SOURCES, ids=str)
def test_codes_are_the_references_bit_for_bit(dtype: Any, format: str) -> None:
    for size in SIZES:
        x = draw(dtype, *size)
        moved = np.empty(x.size + 1, dtype)[1:].reshape(size)  # not where 16 bytes can be read at once
        moved[...] = x
        for given in (x, moved, x.T):
            record, wanted, known = np.full(1, 0.5, np.float32), np.full(1, 0.5, np.float32), np.full(1, 40, np.float32)
            sums, totals = np.zeros((2, -(-len(given) // SUMMED), given.shape[1]), np.float32)
            expected = REFERENCE.quantise(given, largest_of(x), format, True, True, wanted, sums=totals)
            with emulated():
                largest = np.zeros(1, np.float32)
                CUDA.add_amax(largest, given)
                assert largest == largest_of(x)
                found = CUDA.quantise(given, largest, format, True, True, record, sums=sums)
                alone = [CUDA.quantise(given, largest, format, rows, not rows) for rows in (True, False)]
                CUDA.add_amax(largest, given, known)
                assert largest == 40
                CUDA.add_amax(largest, given, np.zeros(1, np.float32))
                assert largest == max(40, largest_of(x))
            np.testing.assert_allclose(sums, totals, rtol=1e-5, atol=2e-3)
            assert record == wanted and alone[0][1] is None and alone[1][0] is None
            for y, z in zip((*found, alone[0][0], alone[1][1]), (*expected, *expected[:2]), strict=True):
                np.testing.assert_array_equal(y, z)


@pytest.mark.parametrize("format", FORMATS)
def test_every_float16_is_rounded_as_in_the_reference(format: str) -> None:
    """All 65536 numbers, under scales at which some are subnormal and some too large; into arrays of a call before."""
    x = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(256, 256)
    for largest in np.array([[0.0], [3.0], [65504.0]], np.float32):
        expected = REFERENCE.quantise(x, largest, format, True, True)
        with emulated():
            before = CUDA.quantise(x[::-1], largest, format, True, True)
            found = CUDA.quantise(x, largest, format, True, True, out=before)
        for y, z, known in zip(found, expected, before, strict=True):
            assert y is known
            np.testing.assert_array_equal(y, z)


def test_histories_move_on() -> None:
    rng = np.random.default_rng(0)
    for tensors in (1, 300):
        history, largest, seen = (abs(rng.normal(size=n)).astype(np.float32) for n in ((tensors, 16), tensors, tensors))
        for factor in (np.ones(1), np.full(1, np.nan)):
            ours, theirs = ([v.copy() for v in (history, largest, seen)] for _ in range(2))
            if np.isnan(factor):
                ours[1][...] = theirs[1][...] = history.max(1)
            with emulated():
                CUDA.shift_history(*ours, factor)
            REFERENCE.shift_history(*theirs, factor)
            for y, z in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(y, z)


def operands(m: int, n: int, k: int, formats: tuple[str, str]) -> tuple[Any, ...]:
    made = []
    for size, format in zip(((m, k), (n, k)), formats, strict=True):
        x = np.random.default_rng(size).normal(size=size).astype(np.float32)
        codes, _, inverse = REFERENCE.quantise(x, largest_of(x), format)
        made.append((codes, inverse))
    (a, p), (b, q) = made
    return a, b, p, q, formats


PRODUCTS = [("e4m3", "e4m3"), ("e5m2", "e4m3"), ("e4m3", "e5m2")]


def check_products(sizes: tuple[int, int, int]) -> None:
    """All that a linear asks for, against the reference."""
    m, n, _ = sizes
    rng = np.random.default_rng(5)
    for formats in PRODUCTS:
        given = operands(*sizes, formats)
        for dtype in SOURCES:
            before = rng.normal(size=(m, n)).astype(dtype)
            bias = rng.normal(size=n).astype(dtype)
            for settings in ({}, {"bias": bias}, {"accumulate": True}):
                found, expected = before.copy(), before.copy()
                with emulated():
                    CUDA.fp8_product(found, *given, **settings)
                REFERENCE.fp8_product(expected, *given, **settings)
                ulp = {"float32": 1e-6, "float16": 2**-10, "bfloat16": 2**-7}[dtype.name]
                y, z = found.astype(np.float64), expected.astype(np.float64)
                np.testing.assert_allclose(y, z, rtol=ulp, atol=ulp)


def test_products_by_cublaslt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sizes that it takes: nothing is widened. A bias is added by the product where the result has 16 bits."""
    monkeypatch.setattr(fp8, "_widened", lambda *arguments: pytest.fail("widened"))
    check_products((32, 48, 64))


@pytest.mark.parametrize("sizes", [(31, 48, 64), (32, 40, 64), (32, 48, 20), (5, 7, 3), (1, 1, 1)])
def test_products_of_sizes_that_cublaslt_does_not_take(sizes: tuple[int, int, int]) -> None:
    check_products(sizes)


@pytest.mark.parametrize("status", [15, 7])
def test_products_on_a_gpu_without_8_bits(status: int) -> None:
    given = operands(32, 48, 64, PRODUCTS[0])
    found, expected = np.zeros((2, 32, 48), np.float32)
    binding = CublasLt()
    binding.eight, binding.refusal = False, status
    with emulated(), multiplying(make_lt(binding)):
        CUDA.fp8_product(found, *given)
        planned = [key for key, plan in multiply._plans.items() if key[0] == "scaled" and plan[0] is None]
        CUDA.fp8_product(found, *given)
        assert len(planned) == 1 and len(multiply._plans) == 2  # asked once: it, and what is done instead
    REFERENCE.fp8_product(expected, *given)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_each_launch_has_the_scales_of_its_matrices() -> None:
    """A plan is made once; where its matrices' scales lie is told at each launch."""
    a, b, p, q, formats = operands(16, 16, 32, PRODUCTS[0])
    with emulated():
        for factor in (1, 4, 0.5):
            found, expected = np.zeros((2, 16, 16), np.float32)
            scales = p * np.float32(factor), q.copy()
            CUDA.fp8_product(found, a, b, *scales, formats)
            REFERENCE.fp8_product(expected, a, b, *scales, formats)
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        assert len(multiply._plans) == 1


def test_what_a_run_that_tunes_finds_counts_from_the_next_on(tmp_path: Path) -> None:
    given, used = operands(32, 48, 64, PRODUCTS[1]), []
    times = iter([5.0, 4.0, 2.0, 7.0, 6.0, 6.0, 3.0, 8.0])

    def seconds(call: Callable[[], None]) -> float:
        call()
        return next(times)

    for way in ("tune", "read"):
        binding = CublasLt()
        with emulated(), multiplying(make_lt(binding, Choices(**{way: tmp_path / "choices"}), seconds)):
            CUDA.fp8_product(np.zeros((32, 48), np.float32), *given)
        used.append(binding.used)
    assert used == [[1, 2, 3, 4, 5, 6, 7, 8, 1], [3]]


def test_what_cublaslt_refuses_the_interpreter_refuses() -> None:
    """Not "TN", sizes that are no multiples of 16, two matrices of E5M2, biases of float32."""
    right = Product(32, 48, 64, "float8_e4m3fn", "bfloat16", True, False, 64, 64, 32, False, False, (16,) * 3)
    right = right._replace(dtype_b="float8_e5m2")
    binding = CublasLt()
    planner, scales = make_lt(binding).plan, np.ones(2, np.float32)
    binding.lend(scales)
    at = scales.ctypes.data, scales.ctypes.data + 4
    assert planner(right, 0, 0, at) is not None
    assert planner(right._replace(bias=True), 16, 0, at) is not None
    for wrong in (
        {"transpose_a": False, "lda": 32},
        {"transpose_b": True, "ldb": 48},
        {"m": 40, "ldd": 40},
        {"k": 56, "lda": 56, "ldb": 56},
        {"dtype": "float8_e5m2"},
        {"out": "float32", "bias": True},
    ):
        bias = 16 if "bias" in wrong else 0
        assert planner(right._replace(**wrong), bias, 0, at) is None, wrong
    binding.eight = False
    assert planner(right, 0, 0, at) is None
