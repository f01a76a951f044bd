"""Embedding, and its gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...arrays import Array, array_module, is_half
from .. import reference
from .grid import PACK, contiguous
from .launch import FLOATS, declare, launch

_THREADS = 256  # of a block (embedding.cu)
_PIECE = 64  # tokens of a row that are added up one after the other

declare("embedding", {"take_rows": FLOATS, "add_rows_by_number": FLOATS, "add_parts": ("float", "double")})


def embedding(table: Array, ids: Array, first: int) -> Array:
    """See ``reference.embedding``."""
    return _take(table, ids, first)


def embedding_backward_weight(grad: Array, ids: Array, first: int, dy: Array) -> None:
    """See ``reference.embedding_backward_weight``. A row's sum is in the order of the tokens, a long one's in pieces:
    the same in every run. 16 bits are added up in float32. TypeError for a 16-bit ``grad``."""
    if is_half(grad.dtype):
        raise TypeError(f"embedding_backward_weight: adding up in {grad.dtype} loses what is added; give it float32")
    if not grad.size or not ids.size:
        return
    xp, (rows, width) = array_module(grad), grad.shape
    row, place = ids.reshape(-1) - first, xp.arange(ids.size)
    row = xp.where((row >= 0) & (row < rows), row, rows)  # those of other ranks last
    keys = xp.sort(row * ids.size + place)  # all different: any sort gives this order
    row, token = keys // ids.size, keys % ids.size
    dy = contiguous(reference.rows(dy))
    if dy.dtype != grad.dtype and not is_half(dy.dtype):
        dy = dy.astype(grad.dtype)
    target, pieces = contiguous(grad), math.ceil(ids.size / _PIECE)
    parts = xp.empty((pieces, width), grad.dtype)
    (down,), block = _grid(ids.size, width, dy.dtype)
    grid = down, math.ceil(width * dy.itemsize / (PACK * block[0]))
    sizes = _PIECE, ids.size, rows, width
    launch("embedding", "add_rows_by_number", (dy.dtype,), grid, block, target, parts, row, token, dy, *sizes)
    grid = pieces - 1, math.ceil(width / _THREADS)
    launch("embedding", "add_parts", (grad.dtype,), grid, (_THREADS,), target, parts, row, *sizes)
    if target is not grad:
        grad[...] = target


def _take(x: Array, index: Array, first: int, scale: Array | None = None) -> Array:
    """y_i = x[index_i - first], zero where that is no row of x; times scale_i, if that is given. index, scale (...)."""
    xp, (rows, width) = array_module(x), x.shape
    y = xp.empty((*index.shape, width), x.dtype)
    if not y.size:
        return y
    x, index = contiguous(x), xp.ascontiguousarray(index, dtype=np.int64)
    if scale is not None:
        scale = xp.ascontiguousarray(scale, dtype=x.dtype)
    grid, block = _grid(index.size, width, x.dtype)
    launch("embedding", "take_rows", (x.dtype,), grid, block, x, index, first, scale, y, index.size, rows, width)
    return y


def _grid(rows: int, width: int, dtype: Any) -> tuple[tuple[int], tuple[int, int]]:
    """The grid and the block for rows of ``width``: a thread for each pack of a row, up to a block's; short rows share
    one."""
    packs = math.ceil(width * dtype.itemsize / PACK)
    threads = min(_THREADS, packs)
    together = max(1, _THREADS // threads)
    return (math.ceil(rows / together),), (threads, together)
