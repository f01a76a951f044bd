"""Norms, of which a row is read from memory once, and from the first-level cache after that; gradients of biases."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import reference
from ..threads import share
from .jit import jit

Floats = NDArray[np.floating]

_PIECE = 128  # rows whose gradients of weights are added up in one go, whatever the number of threads


def _rows(x: Floats) -> Floats:
    found: Floats = reference.rows(np.ascontiguousarray(x))
    return found


def _column(x: Floats) -> Floats:
    """(..., 1) -> (rows,)."""
    return np.ascontiguousarray(x).reshape(-1)


def layer_norm(
    x: Floats, weight: Floats, bias: Floats, epsilon: float, means: Any = reference._means
) -> tuple[Floats, Floats, Floats]:
    """See ``reference.layer_norm``, which does it where ``means`` are taken over several ranks."""
    if means is not reference._means:
        return reference.layer_norm(x, weight, bias, epsilon, means)
    y, mean, rstd = np.empty(x.shape, x.dtype), *np.empty((2, *x.shape[:-1], 1), x.dtype)
    source, target, m, r = _rows(x), reference.rows(y), mean.reshape(-1), rstd.reshape(-1)
    w, c, e = np.ascontiguousarray(weight), np.ascontiguousarray(bias), x.dtype.type(epsilon)
    share(len(source), x.size, lambda a, b: _layer_norm(source[a:b], w, c, e, target[a:b], m[a:b], r[a:b]))
    return y, mean, rstd


def layer_norm_backward(
    dy: Floats,
    x: Floats,
    weight: Floats,
    mean: Floats,
    rstd: Floats,
    means: Any = reference._means,
    onto: Floats | None = None,
) -> Floats:
    """See ``reference.layer_norm_backward``, which does it where ``means`` are taken over several ranks."""
    if means is not reference._means:
        found: Floats = reference.layer_norm_backward(dy, x, weight, mean, rstd, means, onto)
        return found
    dx = np.empty(x.shape, x.dtype)
    given, source, target, m, r = _rows(dy), _rows(x), reference.rows(dx), _column(mean), _column(rstd)
    w = np.ascontiguousarray(weight)
    share(
        len(source),
        x.size,
        lambda a, b: _layer_norm_backward(given[a:b], source[a:b], w, m[a:b], r[a:b], target[a:b]),
    )
    return dx if onto is None else np.add(dx, onto, out=dx)


def layer_norm_backward_weight(dy: Floats, x: Floats, mean: Floats, rstd: Floats) -> tuple[Floats, Floats]:
    """See ``reference.layer_norm_backward_weight``."""
    given, source, m, r = _rows(dy), _rows(x), _column(mean), _column(rstd)
    parts = np.zeros((2, -(-len(given) // _PIECE), x.shape[-1]), x.dtype)

    def work(a: int, b: int) -> None:
        rows = slice(a * _PIECE, b * _PIECE)
        _layer_norm_backward_weight(given[rows], source[rows], m[rows], r[rows], parts[0, a:b], parts[1, a:b])

    share(parts.shape[1], x.size, work)
    dw, db = parts.sum(1)
    return dw, db


def rms_norm(x: Floats, weight: Floats, epsilon: float, means: Any = reference._means) -> tuple[Floats, Floats]:
    """See ``reference.rms_norm``, which does it where ``means`` are taken over several ranks."""
    if means is not reference._means:
        return reference.rms_norm(x, weight, epsilon, means)
    y, rstd = np.empty(x.shape, x.dtype), np.empty((*x.shape[:-1], 1), x.dtype)
    source, target, r = _rows(x), reference.rows(y), rstd.reshape(-1)
    w, e = np.ascontiguousarray(weight), x.dtype.type(epsilon)
    share(len(source), x.size, lambda a, b: _rms_norm(source[a:b], w, e, target[a:b], r[a:b]))
    return y, rstd


def rms_norm_backward(
    dy: Floats, x: Floats, weight: Floats, rstd: Floats, means: Any = reference._means, onto: Floats | None = None
) -> Floats:
    """See ``reference.rms_norm_backward``, which does it where ``means`` are taken over several ranks."""
    if means is not reference._means:
        found: Floats = reference.rms_norm_backward(dy, x, weight, rstd, means, onto)
        return found
    dx = np.empty(x.shape, x.dtype)
    given, source, target, r = _rows(dy), _rows(x), reference.rows(dx), _column(rstd)
    w = np.ascontiguousarray(weight)
    share(len(source), x.size, lambda a, b: _rms_norm_backward(given[a:b], source[a:b], w, r[a:b], target[a:b]))
    return dx if onto is None else np.add(dx, onto, out=dx)


def rms_norm_backward_weight(dy: Floats, x: Floats, rstd: Floats) -> Floats:
    """See ``reference.rms_norm_backward_weight``."""
    given, source, r = _rows(dy), _rows(x), _column(rstd)
    parts = np.zeros((-(-len(given) // _PIECE), x.shape[-1]), x.dtype)

    def work(a: int, b: int) -> None:
        rows = slice(a * _PIECE, b * _PIECE)
        _rms_norm_backward_weight(given[rows], source[rows], r[rows], parts[a:b])

    share(len(parts), x.size, work)
    found: Floats = parts.sum(0)
    return found


def add_rows(grad: Floats, dy: Floats) -> None:
    """See ``reference.add_rows``."""
    given = _rows(dy)
    parts = np.zeros((-(-len(given) // _PIECE), grad.size), given.dtype)
    share(len(parts), dy.size, lambda a, b: _add_rows(given[a * _PIECE : b * _PIECE], parts[a:b]))
    grad += parts.sum(0, dtype=grad.dtype)


@jit
def _layer_norm(x: Floats, w: Floats, bias: Floats, epsilon: Any, y: Floats, mean: Floats, rstd: Floats) -> None:
    real = x.dtype.type
    one, zero, width = real(1), real(0), real(x.shape[1])
    for r in range(x.shape[0]):
        row, out = x[r], y[r]
        total = zero
        for i in range(row.size):
            total += row[i]
        centre = total / width
        square = zero
        for i in range(row.size):
            square += (row[i] - centre) * (row[i] - centre)
        scale = one / np.sqrt(square / width + epsilon)
        for i in range(row.size):
            out[i] = (row[i] - centre) * scale * w[i] + bias[i]
        mean[r], rstd[r] = centre, scale


@jit
def _layer_norm_backward(dy: Floats, x: Floats, w: Floats, mean: Floats, rstd: Floats, dx: Floats) -> None:
    real = x.dtype.type
    zero, width = real(0), real(x.shape[1])
    for r in range(x.shape[0]):
        g, row, out, centre, scale = dy[r], x[r], dx[r], mean[r], rstd[r]
        first, second = zero, zero
        for i in range(row.size):
            product = g[i] * w[i]
            first += product
            second += product * (row[i] - centre)
        first = first / width * scale
        second = second / width * scale * scale * scale
        for i in range(row.size):
            out[i] = g[i] * w[i] * scale - first - (row[i] - centre) * second


@jit
def _layer_norm_backward_weight(dy: Floats, x: Floats, mean: Floats, rstd: Floats, dw: Floats, db: Floats) -> None:
    for r in range(x.shape[0]):
        g, row, centre, scale = dy[r], x[r], mean[r], rstd[r]
        weight, bias = dw[r // _PIECE], db[r // _PIECE]
        for i in range(row.size):
            weight[i] += g[i] * (row[i] - centre) * scale
            bias[i] += g[i]


@jit
def _add_rows(dy: Floats, total: Floats) -> None:
    for p in range(total.shape[0]):
        rows, out = dy[p * _PIECE : (p + 1) * _PIECE], total[p]
        for r in range(0, rows.shape[0] - 3, 4):
            a, b, c, d = rows[r], rows[r + 1], rows[r + 2], rows[r + 3]
            for i in range(out.size):
                out[i] += (a[i] + b[i]) + (c[i] + d[i])
        for r in range(rows.shape[0] // 4 * 4, rows.shape[0]):
            row = rows[r]
            for i in range(out.size):
                out[i] += row[i]


@jit
def _rms_norm(x: Floats, w: Floats, epsilon: Any, y: Floats, rstd: Floats) -> None:
    real = x.dtype.type
    one, zero, width = real(1), real(0), real(x.shape[1])
    for r in range(x.shape[0]):
        row, out = x[r], y[r]
        square = zero
        for i in range(row.size):
            square += row[i] * row[i]
        scale = one / np.sqrt(square / width + epsilon)
        for i in range(row.size):
            out[i] = row[i] * scale * w[i]
        rstd[r] = scale


@jit
def _rms_norm_backward(dy: Floats, x: Floats, w: Floats, rstd: Floats, dx: Floats) -> None:
    real = x.dtype.type
    zero, width = real(0), real(x.shape[1])
    for r in range(x.shape[0]):
        g, row, out, scale = dy[r], x[r], dx[r], rstd[r]
        total = zero
        for i in range(row.size):
            total += g[i] * w[i] * row[i]
        total = total / width * scale * scale * scale
        for i in range(row.size):
            out[i] = g[i] * w[i] * scale - row[i] * total


@jit
def _rms_norm_backward_weight(dy: Floats, x: Floats, rstd: Floats, dw: Floats) -> None:
    for r in range(x.shape[0]):
        g, row, scale, weight = dy[r], x[r], rstd[r], dw[r // _PIECE]
        for i in range(row.size):
            weight[i] += g[i] * row[i] * scale
