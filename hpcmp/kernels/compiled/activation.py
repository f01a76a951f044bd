"""Element-wise kernels: activations, dropout and rotary positions; one pass each."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...random import DropoutMask
from .. import reference
from ..threads import share
from .jit import exp, jit
from .random import draw, room, rows_of

Floats = NDArray[np.floating]


def _flat(x: Floats) -> Floats:
    return np.ascontiguousarray(x).reshape(-1)


def gelu(x: Floats) -> Floats:
    """See ``reference.gelu``; as x / (1 + exp(-2 u)), u the argument of the tanh."""
    y = np.empty(x.shape, x.dtype)
    source, target = _flat(x), y.reshape(-1)
    share(x.size, x.size, lambda a, b: _gelu(source[a:b], target[a:b]))
    return y


def gelu_backward(dy: Floats, x: Floats) -> Floats:
    """See ``reference.gelu_backward``; with s = 1 / (1 + exp(-2 u)), 1 + t = 2 s and 1 - t^2 = 4 s (1 - s)."""
    dx = np.empty(x.shape, x.dtype)
    given, source, target = _flat(dy), _flat(x), dx.reshape(-1)
    share(x.size, x.size, lambda a, b: _gelu_backward(given[a:b], source[a:b], target[a:b]))
    return dx


def swiglu(x: Floats) -> Floats:
    """See ``reference.swiglu``."""
    y = np.empty((*x.shape[:-2], x.shape[-1]), x.dtype)
    source, target = _pairs(x), reference.rows(y)
    share(len(target), y.size, lambda a, b: _swiglu(source[a:b], target[a:b]))
    return y


def swiglu_backward(dy: Floats, x: Floats) -> Floats:
    """See ``reference.swiglu_backward``."""
    dx = np.empty(x.shape, x.dtype)
    given, source, target = reference.rows(np.ascontiguousarray(dy)), _pairs(x), _pairs(dx)
    share(len(given), dx.size, lambda a, b: _swiglu_backward(given[a:b], source[a:b], target[a:b]))
    return dx


def _pairs(x: Floats) -> Floats:
    """(..., 2, f) -> (rows, 2 f): a row's gate, then its up."""
    rows: Floats = np.ascontiguousarray(x).reshape(math.prod(x.shape[:-2]), 2 * x.shape[-1])
    return rows


def dropout(x: Floats, mask: DropoutMask, onto: Floats | None = None) -> Floats:
    """See ``reference.dropout``."""
    y = np.empty(x.shape, x.dtype)
    source, target = reference.rows(np.ascontiguousarray(x)), reference.rows(y)
    drawn = rows_of(mask, x.dtype)
    share(len(target), y.size, lambda a, b: _dropout(source[a:b], target[a:b], drawn, a))
    return y if onto is None else np.add(y, onto, out=y)


def rope(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """See ``reference.rope``."""
    if not x.flags.c_contiguous:
        x[...] = rope(np.ascontiguousarray(x), cos, sin)
        return x
    (s, b, n, d), half = x.shape, cos.shape[-1]
    rows = x.reshape(s, b * n, d)
    c, z = np.ascontiguousarray(cos).reshape(s, half), np.ascontiguousarray(sin).reshape(s, half)
    share(s, x.size, lambda i, j: _rope(rows[i:j], c[i:j], z[i:j]))
    return x


@jit
def _gelu(x: Floats, y: Floats) -> None:
    real = x.dtype.type
    one, c, minus = real(1), real(0.044715), real(-2 * 0.7978845608028654)  # sqrt(2/pi)
    for i in range(x.size):
        v = x[i]
        y[i] = v / (one + exp(minus * v * (one + c * v * v)))


@jit
def _gelu_backward(dy: Floats, x: Floats, dx: Floats) -> None:
    real = x.dtype.type
    one, c, c3, twice = real(1), real(0.044715), real(3 * 0.044715), real(2 * 0.7978845608028654)
    for i in range(x.size):
        v = x[i]
        square = v * v
        s = one / (one + exp(-twice * v * (one + c * square)))
        dx[i] = dy[i] * (s + twice * v * s * (one - s) * (one + c3 * square))


@jit
def _swiglu(x: Floats, y: Floats) -> None:
    one, f = x.dtype.type(1), y.shape[1]
    for r in range(y.shape[0]):
        gate, up, row = x[r, :f], x[r, f:], y[r]
        for i in range(f):
            g = gate[i]
            row[i] = g * up[i] / (one + exp(-g))


@jit
def _swiglu_backward(dy: Floats, x: Floats, dx: Floats) -> None:
    one, f = x.dtype.type(1), dy.shape[1]
    for r in range(dy.shape[0]):
        row, gate, up, dgate, dup = dy[r], x[r, :f], x[r, f:], dx[r, :f], dx[r, f:]
        for i in range(f):  # three loops: to one of five arrays LLVM gives no vectors
            dup[i] = one / (one + exp(-gate[i]))
        for i in range(f):
            g, s = gate[i], dup[i]
            dgate[i] = row[i] * up[i] * s * (one + g * (one - s))
        for i in range(f):
            dup[i] *= row[i] * gate[i]


@jit
def _dropout(x: Floats, y: Floats, drawn: Any, first: int) -> None:
    words = room()
    for r in range(x.shape[0]):
        source, target = x[r], y[r]
        draw(target, drawn, first + r, words, 0)
        for i in range(target.size):
            target[i] *= source[i]


@jit
def _rope(x: Floats, cos: Floats, sin: Floats) -> None:
    half = cos.shape[1]
    for s in range(x.shape[0]):
        c, z = cos[s], sin[s]
        for r in range(x.shape[1]):
            row = x[s, r]
            for i in range(half):  # of two slices of the row, both written, LLVM makes no vectors
                a, b = row[i], row[half + i]
                row[i] = a * c[i] - b * z[i]
                row[half + i] = b * c[i] + a * z[i]
