"""Numbers of 8 bits, for matrix products: E4M3 for activations and weights, E5M2 for gradients of activations.

A matrix is held as codes (uint8) and one scale, ``codes = round(scale x)``. The scale is the largest power of two with
which the largest number still fits: the multiplication is then exact, so that x is rounded once, to 4 (E4M3) or 3
(E5M2) bits, whatever the scale; a scale twice as small, or that of another part of the tensor, changes only numbers
that lie 2^14 (E4M3) or 2^29 (E5M2) below the largest, which are rounded to multiples of the smallest code.
``largest`` is the magnitude that the scale is made for, an array of one number where x is, so that the host asks for
nothing. Micikevicius et al., "FP8 formats for deep learning", 2022, sections 3 and 4.

Results beyond the largest code become it. What is no number, or infinite, becomes NaN: what overflowed before stays to
be seen. Here as on GPUs without such numbers the rounding is made by bits; on a CPU this is slower than float32.
"""

from __future__ import annotations

import numpy as np

from ..arrays import Array, array_module, wide

Codes = tuple[Array | None, Array | None, Array]

#: By format: bits of the mantissa, bias of the exponent, the largest finite code, whether there is an infinity.
_FORMATS = {"e4m3": (3, 7, 0x7E, False), "e5m2": (2, 15, 0x7B, True)}
#: Rows of a matrix whose sum is one of those that ``quantise`` gives: a GPU's block reads so many.
SUMMED = 128

_FARTHEST = 60  # a scale is 2^-60 to 2^60: a product of the inverses of two stays within float32


def add_amax(largest: Array, x: Array, known: Array | None = None) -> None:
    """largest = the larger of itself and the largest finite |x|, in place; with ``known``, that instead, unless it is
    zero. Both (1,)."""
    xp = array_module(x)
    size = xp.abs(x.astype(np.float32, copy=False))
    found = xp.maximum(largest, xp.where(xp.isfinite(size), size, 0).max()) if x.size else largest
    largest[...] = found if known is None else xp.where(known > 0, known, found)


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
    """(codes, codes of x^T, 1 / scale) of x (m, n), any of the first two None unless it is asked for.

    format: "e4m3" or "e5m2". largest (1,): see the head of this file; 0 stands for a scale of 1. record (1,): given the
    largest |x|, as by ``add_amax``, in the same pass. out: the result of an earlier call, to be written over. sums
    (ceil(m / SUMMED), n): given those of each SUMMED rows of x, in the same pass.
    Codes are uint8, (m, n) and (n, m), contiguous; 1 / scale is (1,), of the dtype of ``largest``.
    """
    xp = array_module(x)
    scale = _scale(largest, format)
    made = _encode(x.astype(np.float32, copy=False), scale, format)
    if record is not None:
        add_amax(record, x)
    if sums is not None:
        for i in range(len(sums)):
            sums[i] = x[i * SUMMED : (i + 1) * SUMMED].sum(0, dtype=wide(x.dtype))
    found = (
        xp.ascontiguousarray(made) if rows else None,
        xp.ascontiguousarray(made.T) if columns else None,
        (1 / scale).astype(largest.dtype),
    )
    if out is None:
        return found
    for target, source in zip(out, found, strict=True):
        if target is not None:
            target[...] = source
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
    """out = a b^T inverse_a inverse_b, + bias on every row, or + out if ``accumulate``; in place.

    a (m, k) and b (n, k) are codes, whose formats are named, not both "e5m2"; both inverses (1,). out (m, n); products
    are added up in ``wide(out.dtype)``, float32 for all but float64, and rounded once. bias (n,).
    """
    if formats == ("e5m2", "e5m2"):
        raise ValueError("no product of two matrices in e5m2: GPUs have none")
    dtype = wide(out.dtype)
    first, second = (_decode(codes, format) for codes, format in zip((a, b), formats, strict=True))
    made = first.astype(dtype, copy=False) @ second.T.astype(dtype, copy=False)
    made *= inverse_a.astype(dtype) * inverse_b.astype(dtype)
    if bias is not None:
        made += bias.astype(dtype, copy=False)
    out[...] = out + made if accumulate else made


def shift_history(history: Array, largest: Array, seen: Array, factor: Array) -> None:
    """The largest magnitudes of each tensor move on by a step, in place: the oldest go, ``seen`` comes.

    history (tensors, steps), the newest first; largest (tensors,): that of all steps that are there; seen (tensors,):
    that of the step that ends. factor (1,), float64: if it is NaN, the step came to nothing, and so does this.
    """
    xp = array_module(history)
    moved = xp.concatenate([seen[:, None], history[:, :-1]], 1)
    history[...] = xp.where(xp.isnan(factor), history, moved)
    largest[...] = history.max(1)


def _scale(largest: Array, format: str) -> Array:
    """The largest power of two s with which s ``largest`` is no larger than the largest number of the format."""
    xp = array_module(largest)
    mantissa, bias, most, _ = _FORMATS[format]
    bits = largest.astype(np.float32).view(np.uint32)
    exponent = (bits >> 23).astype(np.int32) - 127
    top, fraction = (most >> mantissa) - bias, (most & ((1 << mantissa) - 1)) << (23 - mantissa)
    exponent = top - exponent - ((bits & 0x7FFFFF) > fraction)
    exponent = xp.where(bits == 0, 0, xp.clip(exponent, -_FARTHEST, _FARTHEST))
    scale: Array = ((exponent + 127) << 23).astype(np.uint32).view(np.float32)
    return scale


def _encode(x: Array, scale: Array, format: str) -> Array:
    """The nearest code, of two the even one. x float32."""
    xp = array_module(x)
    mantissa, bias, most, _ = _FORMATS[format]
    shift = 23 - mantissa
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = x * scale
        bits = xp.ascontiguousarray(scaled).view(np.uint32)
        size = bits & 0x7FFFFFFF
        normal = (size + ((1 << (shift - 1)) - 1) + ((size >> shift) & 1)) >> shift
        normal = xp.minimum(normal.astype(np.int32) - ((127 - bias) << mantissa), most)
        step = np.float32(2.0 ** (24 - mantissa - bias))  # whose last bit is the smallest code
        small = (xp.abs(scaled) + step).view(np.int32) - step.view(np.int32)
    code = xp.where(size < (128 - bias) << 23, small, normal)
    code = xp.where(xp.isfinite(x), code | (bits >> 24 & 0x80).astype(np.int32), 0x7F)
    return code.astype(np.uint8)


def _decode(codes: Array, format: str) -> Array:
    """The numbers that codes stand for, without their scale, in float32."""
    xp = array_module(codes)
    mantissa, bias, most, infinite = _FORMATS[format]
    bits = codes.astype(np.uint32)
    size = bits & 0x7F
    normal = ((size << (23 - mantissa)) + ((127 - bias) << 23)).view(np.float32)
    small = size.astype(np.float32) * np.float32(2.0 ** (1 - bias - mantissa))  # nowhere subnormal: CuPy makes these 0
    value = xp.where(size >> mantissa, normal, small)
    beyond = xp.where((size == most + 1) & infinite, np.float32(np.inf), np.float32(np.nan))
    value = xp.where(size > most, beyond, value)
    return xp.where(bits > 0x7F, -value, value)
