"""A mixture of experts: rows on their way to the experts and back, and their sum."""

from __future__ import annotations

import math

from ...arrays import Array, array_module, wide
from .embedding import _take
from .grid import PACK, contiguous, like
from .launch import FLOATS, declare, launch

_THREADS, _WARP = 256, 32  # of a block (moe.cu)

declare("moe", {"combine": FLOATS, "combine_backward_gates": FLOATS})


def take_rows(x: Array, index: Array, scale: Array | None = None) -> Array:
    """See ``moe.take_rows``."""
    return _take(x, index, 0, scale)


def combine(gates: Array, choices: Array) -> Array:
    """See ``moe.combine``."""
    (tokens, experts, n), choices = choices.shape, contiguous(choices)
    y = array_module(choices).empty((tokens, n), choices.dtype)
    packs = math.ceil(n * choices.itemsize / PACK)
    across = max(1, min(_THREADS, packs))
    block = across, _THREADS // across
    grid = math.ceil(tokens / block[1]), math.ceil(packs / across)
    launch("moe", "combine", (y.dtype,), grid, block, like(choices, gates), choices, y, tokens, experts, n)
    return y


def combine_backward_gates(dy: Array, choices: Array) -> Array:
    """See ``moe.combine_backward_gates``; in float32 of 16 bits."""
    (tokens, experts, n), choices = choices.shape, contiguous(choices)
    dgates = array_module(choices).empty((tokens, experts), wide(choices.dtype))
    down, pairs = _THREADS // _WARP, tokens * experts
    grid, block = (math.ceil(pairs / down),), (_WARP, down)
    given = like(choices, dy), choices, dgates
    launch("moe", "combine_backward_gates", (choices.dtype,), grid, block, *given, pairs, experts, n)
    return dgates
