"""Pullbacks that move numbers about: reductions' shapes, joins, and elements chosen by index."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple
from numpy.typing import DTypeLike

from ..arrays import Array, array_module, wide

Pullback = Callable[[Array], Array]
Shape = tuple[int, ...]


def astype(x: Array, dtype: DTypeLike) -> Array:
    """``x.astype(dtype)`` as a function, to have a rule."""
    return x.astype(dtype)


def to_shape(shape: Shape) -> Pullback:
    """The pullback of every reshape."""
    return lambda dy: dy.reshape(shape)


def _reduced(shape: Shape, axis: Any) -> tuple[int, ...]:
    return tuple(range(len(shape))) if axis is None else normalize_axis_tuple(axis, len(shape))


def kept(shape: Shape, axis: Any) -> Shape:
    """``shape`` with the reduced axes kept, of length 1."""
    axes = _reduced(shape, axis)
    return tuple(1 if i in axes else n for i, n in enumerate(shape))


def count(shape: Shape, axis: Any) -> int:
    """How many elements a reduction over ``axis`` takes together."""
    return math.prod(shape[i] for i in _reduced(shape, axis))


def spread(shape: Shape, axis: Any, divisor: int = 1) -> Pullback:
    """The pullback of a sum over ``axis``, over ``divisor``: every element gets the same share."""
    column = kept(shape, axis)
    return lambda dy: np.broadcast_to(dy.reshape(column) / divisor, shape)


def join(y: Array, xs: Sequence[Array], axis: int = 0) -> tuple[list[Pullback]]:
    """Concatenation: each operand gets its piece of dy."""
    if axis is None:
        raise TypeError("axis=None is not supported")
    axis %= y.ndim
    stops = list(accumulate(x.shape[axis] for x in xs))

    def piece(start: int, stop: int) -> Pullback:
        return lambda dy: dy[(slice(None),) * axis + (slice(start, stop),)]

    return ([piece(start, stop) for start, stop in zip([0, *stops], stops, strict=False)],)


def scatter(shape: Shape, key: Any) -> Pullback:
    """The pullback of y = x[key]: zeros of ``shape``, with dy added at ``key``, where an element may recur."""

    def pull(dy: Array) -> Array:
        xp, dy = array_module(dy), dy.astype(wide(dy.dtype), copy=False)
        dx = xp.zeros(shape, dy.dtype)
        if any(_may_repeat(part) for part in (key if isinstance(key, tuple) else (key,))):
            xp.add.at(dx, key, dy)
        else:
            dx[key] = dy
        return dx

    return pull


def _may_repeat(part: Any) -> bool:
    """Whether a part of an index can name an element twice: integer arrays can, slices and masks cannot."""
    return isinstance(part, list | tuple) or (getattr(part, "ndim", 0) > 0 and part.dtype.kind != "b")


def taken(shape: Shape, indices: Any, axis: int | None) -> Any:
    """The key with which ``take`` indexes."""
    if axis is None:
        return np.unravel_index(np.mod(indices, math.prod(shape)), shape)
    return (slice(None),) * (axis % len(shape)) + (indices,)


def along(shape: Shape, indices: Array, axis: int | None) -> Any:
    """The key with which ``take_along_axis`` indexes: ``indices`` along ``axis``, every position along the others."""
    if axis is None:
        return taken(shape, indices, None)
    xp, n = array_module(indices), len(shape)
    grid = [xp.arange(length).reshape([-1 if i == j else 1 for j in range(n)]) for i, length in enumerate(shape)]
    grid[axis] = indices
    return tuple(grid)
