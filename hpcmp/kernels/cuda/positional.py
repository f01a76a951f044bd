"""Dropout by global index, and rotary positions."""

from __future__ import annotations

import math

from ...arrays import Array, array_module
from ...random import DropoutMask
from .grid import contiguous, lanes, like, tiles
from .launch import FLOATS, declare, launch, mask_arguments

declare("positional", {"dropout": FLOATS, "rope": FLOATS})


def dropout(x: Array, mask: DropoutMask, onto: Array | None = None) -> Array:
    """See ``reference.dropout``. The kernel draws the mask: no more is read and written than x, ``onto`` and y."""
    xp, n, rows = array_module(x), x.shape[-1], math.prod(x.shape[:-1])
    x, y, onto = contiguous(x), xp.empty(x.shape, x.dtype), None if onto is None else like(x, onto)
    grid, block, chunks = tiles(rows, n, lanes(x.dtype))
    drawn = mask_arguments(mask, x.shape[:-1], xp)
    launch("positional", "dropout", (x.dtype,), grid, block, x, onto, y, *drawn, rows, n, chunks)
    return y


def rope(x: Array, cos: Array, sin: Array) -> Array:
    """See ``reference.rope``. What does not turn is neither read nor written."""
    (positions, samples, heads, _), half = x.shape, cos.shape[-1]
    if x.size and half and x.strides[-1] != x.itemsize:
        x[...] = rope(contiguous(x), cos, sin)
        return x
    steps = (step // x.itemsize for step in x.strides[:3])
    grid, block, chunks = tiles(positions * samples * heads, half, lanes(x.dtype))
    sizes = positions * samples * heads, samples, heads, half, chunks
    launch("positional", "rope", (x.dtype,), grid, block, x, like(x, cos), like(x, sin), *steps, *sizes)
    return x
