"""Sums of squares, for the norms of gradients."""

from __future__ import annotations

from ...arrays import Array, array_module
from .grid import PACK, contiguous
from .launch import FLOATS, declare, launch

_THREADS, _UNROLL, _MOST = 256, 4, 1024  # threads of a block, packs that one has in flight (squares.cu), blocks

declare("squares", {"square_parts": FLOATS, "add_parts": [()]})


def square_sum(x: Array) -> float:
    """See ``reference.square_sum``. The host waits for the result."""
    total = array_module(x).zeros(1)
    add_square_sum(total, x)
    return float(total[0])


def add_square_sum(total: Array, x: Array) -> None:
    """See ``reference.add_square_sum``. The number of partial sums depends on the size alone, and so do the bits."""
    xp, x = array_module(x), contiguous(x)
    blocks = min(_MOST, -(-x.nbytes // (_THREADS * _UNROLL * PACK)))
    parts = xp.empty(blocks)
    launch("squares", "square_parts", (x.dtype,), (blocks,), (_THREADS,), x, parts, x.size)
    launch("squares", "add_parts", (), (min(1, blocks),), (_THREADS,), parts, total, blocks)
