"""Numbers of 8 bits: every code, ties, the ends of the range, scales and products, against ml_dtypes and float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from hpcmp.arrays import dtype_of
from hpcmp.kernels import REFERENCE, fp8

TYPES: dict[str, Any] = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
FORMATS = list(TYPES)
CODES = np.arange(256, dtype=np.uint8)


def numbers(codes: np.ndarray[Any, Any], format: str) -> np.ndarray[Any, Any]:
    """What codes stand for."""
    found: np.ndarray[Any, Any] = codes.view(TYPES[format]).astype(np.float32)
    return found


def codes_of(x: np.ndarray[Any, Any], format: str) -> np.ndarray[Any, Any]:
    """Under a scale of 1."""
    one = np.array([LARGEST[format]], np.float32)
    found, _, inverse = fp8.quantise(x.reshape(1, -1), one, format)
    assert found is not None and inverse == 1
    return found.reshape(x.shape)


@pytest.mark.parametrize("format", FORMATS)
def test_every_code_stands_for_its_number_and_is_found_again(format: str) -> None:
    expected = numbers(CODES, format)
    np.testing.assert_array_equal(fp8._decode(CODES, format), expected)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(codes_of(expected, format)[finite], CODES[finite])
    assert set(codes_of(expected, format)[~finite]) == {0x7F}  # NaN, of infinities too


@pytest.mark.parametrize("format", FORMATS)
def test_what_lies_between_is_rounded_to_nearest_even(format: str) -> None:
    """All midpoints of neighbours, subnormal ones among them, their neighbours in float32, and many others."""
    all_numbers = numbers(CODES, format)
    finite = np.sort(all_numbers[np.isfinite(all_numbers)]).astype(np.float64)
    middle = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    draw = np.random.default_rng(0)
    wide = (draw.normal(size=20000) * 2.0 ** draw.integers(-30, 20, 20000)).astype(np.float32)
    edges = [np.nextafter(middle, np.float32(sign * np.inf)) for sign in (1, -1)]
    x = np.concatenate([middle, *edges, wide])
    expected = np.clip(x, -LARGEST[format], LARGEST[format]).astype(TYPES[format]).view(np.uint8)
    np.testing.assert_array_equal(codes_of(x, format), expected)
    nearest = np.abs(finite[:, None] - x[: 3 * len(middle)]).min(0)
    assert (np.abs(numbers(codes_of(x, format), format)[: 3 * len(middle)] - x[: 3 * len(middle)]) == nearest).all()


@pytest.mark.parametrize("format", FORMATS)
def test_beyond_the_largest_code_is_the_largest_and_no_number_stays_none(format: str) -> None:
    most = LARGEST[format]
    x = np.array([most, most * 1.06, 3e38, -3e38, np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-30, -1e-30], np.float32)
    found = numbers(codes_of(x, format), format)
    np.testing.assert_array_equal(found[:4], [most, most, most, -most])
    assert np.isnan(found[4:7]).all() and (found[7:] == 0).all() and np.signbit(found[[8, 10]]).all()


@pytest.mark.parametrize("format", FORMATS)
def test_a_scale_is_the_largest_power_of_two_that_fits(format: str) -> None:
    draw = np.random.default_rng(1)
    cases = [1.0, 1.75, np.nextafter(np.float32(1.75), np.float32(2)), 448, 449, *np.exp(draw.uniform(-25, 25, 200))]
    for largest in map(np.float32, cases):
        scale = fp8._scale(np.array([largest], np.float32), format)[0]
        assert np.frexp(scale)[0] == 0.5
        assert scale * largest <= LARGEST[format] < 2 * scale * np.float64(largest)
    for largest, scale in (0.0, 1.0), (1e-40, 2.0**60), (3e38, 2.0**-60):
        assert fp8._scale(np.array([largest], np.float32), format)[0] == scale


def test_a_smaller_scale_changes_what_is_far_below_the_largest_alone() -> None:
    """Why the part of a tensor that a rank has may have a scale of its own."""
    draw = np.random.default_rng(2)
    x = (draw.normal(size=(64, 64)) * 2.0 ** draw.integers(-30, 1, (64, 64))).astype(np.float32)
    for format, range_ in (("e4m3", 14), ("e5m2", 29)):
        found = []
        for largest in (abs(x).max(), 4 * abs(x).max()):
            codes, _, inverse = fp8.quantise(x, np.array([largest]), format)
            assert codes is not None
            found.append(numbers(codes, format) * np.float32(inverse))
        above = abs(x) >= 8 * abs(x).max() * 2.0**-range_
        assert 500 < above.sum() and (found[0] == found[1])[above].all()
        if format == "e4m3":
            assert (found[0] != found[1]).any()


def test_codes_of_the_transpose_and_magnitudes_come_in_one_pass() -> None:
    x = np.random.default_rng(3).normal(size=(5, 7)).astype(dtype_of("bfloat16"))
    x[1, 2], x[2, 3], x[3, 4] = np.nan, -9, -np.inf
    record, largest = np.full(1, 2, np.float32), np.zeros(1, np.float32)
    fp8.add_amax(largest, x)
    rows, columns, inverse = fp8.quantise(x, largest, "e4m3", True, True, record)
    assert rows is not None and columns is not None and largest == record == 9 and inverse == 2.0**-5
    np.testing.assert_array_equal(columns, rows.T)
    assert fp8.quantise(x, largest, "e4m3", False, True)[0] is None
    again = fp8.quantise(2 * x, 2 * largest, "e4m3", True, True, out=(rows, columns, inverse))
    assert again[0] is rows and again[2] is inverse and inverse == 2.0**-4
    fp8.add_amax(largest, np.full((2, 2), 99, np.float32), known=np.full(1, 5, np.float32))
    assert largest == 5
    fp8.add_amax(largest, np.full((2, 2), 99, np.float32), known=np.zeros(1, np.float32))
    assert largest == 99


@pytest.mark.parametrize("out", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("formats", [("e4m3", "e4m3"), ("e5m2", "e4m3"), ("e4m3", "e5m2")])
def test_a_product_is_that_of_the_numbers(formats: tuple[str, str], out: str) -> None:
    draw = np.random.default_rng(4)
    x, y = draw.normal(size=(9, 33)).astype(np.float32), draw.normal(size=(6, 33)).astype(np.float32)
    (a, _, p), (b, _, q) = (
        fp8.quantise(v, np.abs(v).max(keepdims=True).reshape(1), f) for v, f in zip((x, y), formats, strict=True)
    )
    assert a is not None and b is not None
    exact = (numbers(a, formats[0]) * p).astype(np.float64) @ (numbers(b, formats[1]) * q).astype(np.float64).T
    u, v = (2.0**-4 if format == "e4m3" else 2.0**-3 for format in formats)
    assert (abs(exact - x @ y.T) <= (u + v + u * v + 1e-5) * (abs(x) @ abs(y.T))).all()
    bias, before = draw.normal(size=6).astype(dtype_of(out)), draw.normal(size=(9, 6)).astype(dtype_of(out))
    ulp = {"float32": 2e-6, "bfloat16": 2**-7, "float16": 2**-9}[out]
    for added, settings in ((0, {}), (bias, {"bias": bias}), (before, {"accumulate": True})):
        made = before.copy() if "accumulate" in settings else np.full_like(before, np.nan)
        REFERENCE.fp8_product(made, a, b, p, q, formats, **settings)
        np.testing.assert_allclose(made.astype(np.float64), exact + np.asarray(added, np.float64), rtol=ulp, atol=ulp)


def test_two_gradients_are_not_multiplied() -> None:
    one, scale = np.ones((2, 2), np.uint8), np.ones(1, np.float32)
    with pytest.raises(ValueError, match="two matrices in e5m2"):
        fp8.fp8_product(np.ones((2, 2)), one, one, scale, scale, ("e5m2", "e5m2"))


def test_a_history_holds_the_last_steps_of_those_that_counted() -> None:
    history, largest = np.zeros((2, 3), np.float32), np.zeros(2, np.float32)
    expected = [(5, 1), (5, 1), (5, 2), (4, 8), (4, 8), (4, 8)]
    for seen, wanted in zip([(5, 1), (2, 1), (1, 2), (4, 8), (1, 0), (0, 3)], expected, strict=True):
        fp8.shift_history(history, largest, np.array(seen, np.float32), np.ones(1))
        assert tuple(largest) == wanted
        before = history.copy()
        fp8.shift_history(history, largest, np.full(2, 99, np.float32), np.full(1, np.nan))
        np.testing.assert_array_equal(history, before)
    np.testing.assert_array_equal(history, [[0, 1, 4], [3, 0, 8]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_are_of_128_rows_each(dtype: str) -> None:
    """And of the rows that are left: added up, they are the gradient of a bias."""
    x = np.random.default_rng(0).normal(size=(300, 7)).astype(dtype_of(dtype))
    sums = np.full((3, 7), np.nan, np.float32)
    fp8.quantise(x, np.ones(1, np.float32), "e5m2", sums=sums)
    for i, each in enumerate(sums):
        expected = x[128 * i : 128 * (i + 1)].astype(np.float64).sum(0)
        np.testing.assert_allclose(each, expected, rtol=1e-5, atol=1e-5)
