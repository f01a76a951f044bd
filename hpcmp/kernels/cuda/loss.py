"""Cross-entropy: the logits, the largest array of a step, are read once, and once read and written over."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...arrays import Array, array_module, wide
from .. import reference
from .grid import PACK, contiguous
from .launch import FLOATS, declare, launch

_THREADS = 512  # of a block at most (loss.cu)

declare("loss", {"cross_entropy_parts": FLOATS, "cross_entropy_backward": FLOATS})


def cross_entropy_parts(logits: Array, targets: Array, first: int) -> tuple[Array, Array, Array]:
    """See ``reference.cross_entropy_parts``; in float32 of 16 bits."""
    xp, n, dtype = array_module(logits), logits.shape[-1], wide(logits.dtype)
    if not n:
        found: tuple[Array, Array, Array] = reference.cross_entropy_parts(logits.astype(dtype), targets, first)
        return found
    x, targets = contiguous(logits), xp.ascontiguousarray(targets, dtype=np.int64)
    top, total, chosen = parts = [xp.empty(targets.shape, dtype) for _ in range(3)]
    grid, block = _rows(targets.size, n, x.dtype)
    launch("loss", "cross_entropy_parts", (x.dtype,), grid, block, x, targets, first, *parts, targets.size, n)
    return top, total, chosen


def cross_entropy_backward(scale: Array, logits: Array, targets: Array, first: int, lse: Array) -> Array:
    """See ``reference.cross_entropy_backward``."""
    if not logits.size:
        return logits
    xp, n, dtype = array_module(logits), logits.shape[-1], wide(logits.dtype)
    x, targets = contiguous(logits), xp.ascontiguousarray(targets, dtype=np.int64)
    scale, lse = xp.ascontiguousarray(scale, dtype=dtype), xp.ascontiguousarray(lse, dtype=dtype)
    grid, block = _rows(targets.size, n, x.dtype)
    launch("loss", "cross_entropy_backward", (x.dtype,), grid, block, scale, x, targets, first, lse, targets.size, n)
    if x is not logits:
        logits[...] = x
    return logits


def _rows(rows: int, n: int, dtype: Any) -> tuple[tuple[int], tuple[int, int]]:
    """The grid and the block for rows of n: a thread for each pack of a row, up to a block's; short rows share one."""
    packs = math.ceil(n * dtype.itemsize / PACK)
    threads = min(_THREADS, 32 * math.ceil(packs / 32))
    together = max(1, 128 // threads)
    return (math.ceil(rows / together),), (threads, together)
