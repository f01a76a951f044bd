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
    """See ``reference.rope``."""
    (positions, *others, n), half = x.shape, cos.shape[-1]
    x, y, cos, sin = contiguous(x), array_module(x).empty(x.shape, x.dtype), like(x, cos), like(x, sin)
    together, pack = math.prod(others), lanes(x.dtype)
    packs = -(-half // pack) + -(-(n - 2 * half) // pack)
    grid, block, chunks = tiles(positions * together, packs, 1)
    launch(
        "positional", "rope", (x.dtype,), grid, block, x, cos, sin, y, positions * together, n, half, together, chunks
    )
    return y
