"""What is done element by element: activations, sums and casts; one pass over memory each."""

from __future__ import annotations

import math

from ...arrays import Array, array_module
from .. import reference
from .grid import contiguous, lanes, like, tiles
from .launch import FLOATS, declare, launch

UNROLL = 4  # of activation.cu
_CASTS = [(a, b) for a in FLOATS for b in FLOATS if "double" not in (a, b)]

declare(
    "activation",
    dict.fromkeys(("gelu", "gelu_backward", "bias_gelu", "add", "swiglu", "swiglu_backward"), FLOATS)
    | {"assign": _CASTS},
)


def gelu(x: Array) -> Array:
    """See ``reference.gelu``."""
    x, y = contiguous(x), array_module(x).empty(x.shape, x.dtype)
    grid, block, chunks = tiles(1, x.size, lanes(x.dtype), UNROLL)
    launch("activation", "gelu", (x.dtype,), grid, block, x, y, x.size, chunks)
    return y


def gelu_backward(dy: Array, x: Array) -> Array:
    """See ``reference.gelu_backward``."""
    return _binary("gelu_backward", dy, x)


def add(x: Array, y: Array) -> Array:
    """See ``reference.add``; where the dtypes differ, that does it."""
    return _binary("add", x, y) if x.dtype == y.dtype else reference.add(x, y).astype(x.dtype, copy=False)


def swiglu(x: Array) -> Array:
    """See ``reference.swiglu``."""
    rows, n = math.prod(x.shape[:-2]), x.shape[-1]
    x, y = contiguous(x), array_module(x).empty((*x.shape[:-2], n), x.dtype)
    grid, block, chunks = tiles(rows, n, lanes(x.dtype), UNROLL // 2)
    launch("activation", "swiglu", (x.dtype,), grid, block, x, y, rows, n, chunks)
    return y


def swiglu_backward(dy: Array, x: Array) -> Array:
    """See ``reference.swiglu_backward``."""
    rows, n = math.prod(x.shape[:-2]), x.shape[-1]
    dy, x, dx = like(x, dy), contiguous(x), array_module(x).empty(x.shape, x.dtype)
    grid, block, chunks = tiles(rows, n, lanes(x.dtype))
    launch("activation", "swiglu_backward", (x.dtype,), grid, block, dy, x, dx, rows, n, chunks)
    return dx


def assign(target: Array, x: Array) -> None:
    """See ``reference.assign``, which does it to and from float64, and where the target is not contiguous."""
    if 8 in (target.itemsize, x.itemsize) or not target.flags.c_contiguous:
        return reference.assign(target, x)
    types = x.dtype, target.dtype
    grid, block, chunks = tiles(1, x.size, lanes(min(types, key=lambda dtype: dtype.itemsize)), UNROLL // 2)
    launch("activation", "assign", types, grid, block, target, contiguous(x), x.size, chunks)


def _binary(kernel: str, a: Array, b: Array) -> Array:
    """A kernel of two arrays of one shape, whose result has the dtype of the first."""
    a, b, made = contiguous(a), like(a, b), array_module(a).empty(a.shape, a.dtype)
    grid, block, chunks = tiles(1, a.size, lanes(a.dtype), UNROLL // 2)
    launch("activation", kernel, (a.dtype,), grid, block, a, b, made, a.size, chunks)
    return made
