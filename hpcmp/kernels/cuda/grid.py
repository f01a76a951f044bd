"""How work is shared among blocks, and arrays made fit for it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...arrays import Array, array_module, wide

PACK = 16  # bytes that a thread moves at once
_THREADS = 256


def tiles(rows: int, n: int, lanes: int, unroll: int = 1) -> tuple[tuple[int], tuple[int, int], np.uint32]:
    """The grid, the block and the tiles of a row, for work on each of ``rows`` rows of n numbers, of which a thread has
    ``unroll`` packs of ``lanes``: ``Tile`` of common.cuh."""
    packs = -(-n // (lanes * unroll))
    across = min(_THREADS, 1 << max(0, packs - 1).bit_length())
    down, chunks = _THREADS // across, -(-packs // across)
    return (-(-rows // down) * chunks,), (across, down), np.uint32(chunks)


def lanes(dtype: np.dtype[Any]) -> int:
    """The numbers of a pack."""
    return PACK // dtype.itemsize


def contiguous(x: Array) -> Array:
    return array_module(x).ascontiguousarray(x)


def like(x: Array, other: Array) -> Array:
    """``other`` in the dtype of x, contiguous."""
    return array_module(x).ascontiguousarray(other, dtype=x.dtype)


def column(x: Array, dtype: np.dtype[Any]) -> Array:
    """A number a row, contiguous, in the dtype that ``dtype`` is added up in."""
    return array_module(x).ascontiguousarray(x, dtype=wide(dtype))


def count(shape: tuple[int, ...]) -> int:
    """How many rows have this shape."""
    return math.prod(shape)
