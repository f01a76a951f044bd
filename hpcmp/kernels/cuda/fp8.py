"""Numbers of 8 bits: codes of matrices, as they lie and transposed in one pass, and their products by cuBLASLt.

cuBLASLt multiplies them on GPUs of compute capability 8.9 on, where every size is a multiple of 16, and both matrices
have their numbers to be summed side by side (which is why ``quantise`` transposes). Its "fast accumulation" stays off:
on Hopper that keeps sums in about 14 bits. What it does not take is computed by an ordinary product of the numbers that
the codes stand for, which are exact in bfloat16: the same but for rounding, and slower than without FP8.
"""

from __future__ import annotations

import numpy as np

from ...arrays import Array, array_module, dtype_of
from .. import fp8 as specification
from ..fp8 import SUMMED, Codes
from .grid import PACK, contiguous, lanes
from .launch import declare, launch
from .multiply import gemm, scaled

_THREADS, _SIDE, _UNROLL, _MOST = 256, SUMMED, 4, 1024  # as in fp8.cu; blocks of ``amax``
_MANTISSA = {"e4m3": 3, "e5m2": 2}
_NAMES = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
_SOURCES = "float", "__half", "__nv_bfloat16"

declare(
    "fp8",
    {
        "amax": _SOURCES,
        "quantise": [(t, m) for t in _SOURCES for m in (3, 2)],
        "dequantise": [("__nv_bfloat16", m) for m in (3, 2)],
        "shift_history": [()],
    },
)


def add_amax(largest: Array, x: Array, known: Array | None = None) -> None:
    """See ``fp8.add_amax``."""
    if not _single(x, largest, known):
        return specification.add_amax(largest, x, known)
    x = contiguous(x)
    blocks = min(_MOST, max(1, -(-x.nbytes // (_THREADS * _UNROLL * PACK))))
    launch("fp8", "amax", (x.dtype,), (blocks,), (_THREADS,), x, largest, known, x.size)


def quantise(
    x: Array,
    largest: Array,
    format: str,
    rows: bool = True,
    columns: bool = False,
    record: Array | None = None,
    out: Codes | None = None,
    sums: Array | None = None,
) -> Codes:
    """See ``fp8.quantise``."""
    if not (_single(x, largest, record, sums) and x.size):
        return specification.quantise(x, largest, format, rows, columns, record, out, sums)
    xp, x, (m, n) = array_module(x), contiguous(x), x.shape
    if out is None:
        codes = xp.empty((m, n), np.uint8) if rows else None
        out = codes, xp.empty((n, m), np.uint8) if columns else None, xp.empty(1, np.float32)
    tiles = -(-m // _SIDE) * -(-n // _SIDE)
    types = x.dtype, _MANTISSA[format]
    launch("fp8", "quantise", types, (tiles,), (_THREADS,), x, largest, *out, record, sums, m, n)
    return out


def fp8_product(
    out: Array,
    a: Array,
    b: Array,
    inverse_a: Array,
    inverse_b: Array,
    formats: tuple[str, str],
    bias: Array | None = None,
    accumulate: bool = False,
) -> None:
    """See ``fp8.fp8_product``."""
    if formats == ("e5m2", "e5m2") or out.dtype == np.float64:
        return specification.fp8_product(out, a, b, inverse_a, inverse_b, formats, bias, accumulate)
    first, second = (x.astype(np.float32, copy=False) for x in (inverse_a, inverse_b))
    names = _NAMES[formats[0]], _NAMES[formats[1]]
    if not scaled(a, b, out, names, (first, second), bias, accumulate=accumulate):
        _widened(out, a, b, (first, second), formats, bias, accumulate)


def shift_history(history: Array, largest: Array, seen: Array, factor: Array) -> None:
    """See ``fp8.shift_history``."""
    if not (_single(history, largest, seen) and history.flags.c_contiguous and factor.dtype == np.float64):
        return specification.shift_history(history, largest, seen, factor)
    tensors, steps = history.shape
    launch(
        "fp8", "shift_history", (), (-(-tensors // _THREADS),), (_THREADS,), history, largest, seen, factor, tensors,
        steps,
    )  # fmt: skip


def _widened(
    out: Array,
    a: Array,
    b: Array,
    inverse: tuple[Array, Array],
    formats: tuple[str, str],
    bias: Array | None,
    accumulate: bool,
) -> None:
    """The product of the numbers that the codes stand for, in bfloat16, which gives all but float16."""
    made = out if out.dtype != np.float16 else out.astype(np.float32)
    first, second = (_numbers(codes, i, format) for codes, i, format in zip((a, b), inverse, formats, strict=True))
    gemm(first, second.T, made, bias, accumulate=accumulate)
    if made is not out:
        out[...] = made


def _numbers(codes: Array, inverse: Array, format: str) -> Array:
    made = array_module(codes).empty(codes.shape, dtype_of("bfloat16"))
    types = made.dtype, _MANTISSA[format]
    blocks = -(-codes.size // (_THREADS * lanes(made.dtype)))
    launch("fp8", "dequantise", types, (blocks,), (_THREADS,), contiguous(codes), inverse, made, codes.size)
    return made


def _single(x: Array, *others: Array | None) -> bool:
    """Whether x has at most 32 bits a number, and what is beside it float32."""
    return x.itemsize <= 4 and all(other is None or other.dtype == np.float32 for other in others)
