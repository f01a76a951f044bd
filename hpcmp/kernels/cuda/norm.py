"""LayerNorm and RMSNorm, and the sums over rows that are gradients of weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...arrays import Array, array_module, is_half, wide
from .. import reference
from ..half import widened
from .grid import PACK, column, contiguous, like
from .launch import FLOATS, declare, launch

_KEPT, _THREADS = 2, 1024  # of norm.cu
_ACROSS, _DOWN = 32, 8  # of columns.cu

declare("norm", dict.fromkeys(("norm", "norm_backward"), [(t, centred) for t in FLOATS for centred in (True, False)]))
declare("columns", {"column_parts": FLOATS, "column_sums": ("float", "double")})


def layer_norm(
    x: Array, weight: Array, bias: Array, epsilon: float, means: Any = reference._means
) -> tuple[Array, Array, Array]:
    """See ``reference.layer_norm``, which does it where ``means`` are taken over several ranks."""
    if means is not reference._means:
        found: tuple[Array, Array, Array] = _reference("layer_norm", x)(x, weight, bias, epsilon, means)
        return found
    y, mean, rstd = _forward(x, weight, bias, epsilon)
    return y, mean, rstd


def rms_norm(x: Array, weight: Array, epsilon: float, means: Any = reference._means) -> tuple[Array, Array]:
    """See ``reference.rms_norm``, which does it where ``means`` are taken over several ranks."""
    if means is not reference._means:
        found: tuple[Array, Array] = _reference("rms_norm", x)(x, weight, epsilon, means)
        return found
    y, _, rstd = _forward(x, weight, None, epsilon)
    return y, rstd


def layer_norm_backward(
    dy: Array,
    x: Array,
    weight: Array,
    mean: Array,
    rstd: Array,
    means: Any = reference._means,
    onto: Array | None = None,
) -> Array:
    """See ``reference.layer_norm_backward``, which does it where ``means`` are taken over several ranks."""
    if means is not reference._means:
        return _reference("layer_norm_backward", x)(dy, x, weight, mean, rstd, means, onto)
    return _backward(dy, x, weight, mean, rstd, onto)


def rms_norm_backward(
    dy: Array, x: Array, weight: Array, rstd: Array, means: Any = reference._means, onto: Array | None = None
) -> Array:
    """See ``reference.rms_norm_backward``, which does it where ``means`` are taken over several ranks."""
    if means is not reference._means:
        return _reference("rms_norm_backward", x)(dy, x, weight, rstd, means, onto)
    return _backward(dy, x, weight, None, rstd, onto)


def layer_norm_backward_weight(dy: Array, x: Array, mean: Array, rstd: Array) -> tuple[Array, Array]:
    """See ``reference.layer_norm_backward_weight``."""
    xp, n = array_module(x), x.shape[-1]
    dw, db = xp.empty(n, wide(x.dtype)), xp.empty(n, wide(x.dtype))
    _sum_rows(like(x, dy), x, mean, rstd, dw, db)
    return dw, db


def rms_norm_backward_weight(dy: Array, x: Array, rstd: Array) -> Array:
    """See ``reference.rms_norm_backward_weight``."""
    dw = array_module(x).empty(x.shape[-1], wide(x.dtype))
    _sum_rows(like(x, dy), x, None, rstd, dw, None)
    return dw


def add_rows(grad: Array, dy: Array) -> None:
    """See ``reference.add_rows``. Raises TypeError for a gradient of 16 bits."""
    if is_half(grad.dtype):
        raise TypeError(f"add_rows: adding up in {grad.dtype} loses what is added; give it a float32 array")
    if grad.dtype == wide(dy.dtype) and grad.flags.c_contiguous:
        _sum_rows(contiguous(dy), None, None, None, None, grad, onto=True)
    else:
        reference.add_rows(grad, dy)


def _forward(x: Array, weight: Array, bias: Array | None, epsilon: float) -> tuple[Array, Array | None, Array]:
    xp, n = array_module(x), x.shape[-1]
    x, weight, centred = contiguous(x), like(x, weight), bias is not None
    y, rstd = xp.empty(x.shape, x.dtype), xp.empty((*x.shape[:-1], 1), wide(x.dtype))
    mean = xp.empty(rstd.shape, rstd.dtype) if centred else None
    bias = like(x, bias) if centred else None
    grid, block = _rows(rstd.size, n, x.dtype)
    launch(
        "norm", "norm", (x.dtype, centred), grid, block, x, weight, bias, float(epsilon), y, mean, rstd, rstd.size, n
    )
    return y, mean, rstd


def _backward(dy: Array, x: Array, weight: Array, mean: Array | None, rstd: Array, onto: Array | None) -> Array:
    xp, n = array_module(x), x.shape[-1]
    dy, x, weight, onto = like(x, dy), contiguous(x), like(x, weight), None if onto is None else like(x, onto)
    mean, rstd = None if mean is None else column(mean, x.dtype), column(rstd, x.dtype)
    dx = xp.empty(x.shape, x.dtype)
    grid, block = _rows(rstd.size, n, x.dtype)
    types = (x.dtype, mean is not None)
    launch("norm", "norm_backward", types, grid, block, dy, x, weight, mean, rstd, onto, dx, rstd.size, n)
    return dx


def _sum_rows(
    dy: Array, x: Array | None, mean: Array | None, rstd: Array | None, dw: Array | None, db: Array | None,
    onto: bool = False,
) -> None:  # fmt: skip
    """dw = sum dy (x - mean) rstd, db = sum dy, of those that are given; added to what is there if ``onto``.

    Pieces of rows for some 1000 blocks, more than a GPU has at work at once; their number depends on the shape alone.
    """
    xp, n = array_module(dy), dy.shape[-1]
    rows = dy.size // n if n else 0
    across = -(-n * dy.dtype.itemsize // (_ACROSS * PACK))
    pieces = min(max(1, 1024 // max(1, across)), max(1, -(-rows // (4 * _DOWN))))
    piece = -(-rows // pieces)
    adds = wide(dy.dtype)
    parts = [None if total is None else xp.empty((pieces, n), adds) for total in (dw, db)]
    x = None if x is None else contiguous(x)
    statistics = [None if s is None else column(s, dy.dtype) for s in (mean, rstd)]
    given = (dy, x, *statistics, *parts)
    launch("columns", "column_parts", (dy.dtype,), (across, pieces), (_ACROSS, _DOWN), *given, rows, n, piece)
    for part, total in zip(parts, (dw, db), strict=True):
        if part is not None:
            grid, flag = (-(-n // _ACROSS),), np.bool_(onto)
            launch("columns", "column_sums", (adds,), grid, (_ACROSS, _DOWN), part, total, pieces, n, flag)


def _reference(name: str, x: Array) -> Any:
    """A kernel of the specification, for the dtype of x."""
    kernel = getattr(reference, name)
    return widened(name, kernel) if is_half(x.dtype) else kernel


def _rows(rows: int, n: int, dtype: np.dtype[Any]) -> tuple[tuple[int], tuple[int, int]]:
    """The grid and the block for rows of n: as many warps a row as have its packs in registers, 256 threads a block or
    those of one row."""
    packs = -(-n * dtype.itemsize // PACK)
    threads = min(_THREADS, max(32, -(-packs // (_KEPT * 32)) * 32))
    together = max(1, 256 // threads)
    return (-(-rows // together),), (threads, together)
