"""Cross-entropy and the gradient of an embedding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .. import reference
from ..threads import share
from .jit import exp, jit, largest

Floats = NDArray[np.floating]
Integers = NDArray[np.int64]


def _columns(ids: NDArray[np.integer], first: int) -> Integers:
    """ids - first, flat."""
    return np.ascontiguousarray(ids, np.int64).reshape(-1) - first


def cross_entropy_parts(logits: Floats, targets: NDArray[np.integer], first: int) -> tuple[Floats, Floats, Floats]:
    """See ``reference.cross_entropy_parts``; a row's second pass, for the sum, finds it in the cache."""
    if not logits.shape[-1]:
        return reference.cross_entropy_parts(logits, targets, first)
    parts = np.empty((3, *targets.shape), logits.dtype)
    x, column, flat = reference.rows(np.ascontiguousarray(logits)), _columns(targets, first), parts.reshape(3, -1)
    share(len(x), x.size, lambda a, b: _cross_entropy_parts(x[a:b], column[a:b], *flat[:, a:b]))
    return parts[0], parts[1], parts[2]


def cross_entropy_backward(
    scale: Floats, logits: Floats, targets: NDArray[np.integer], first: int, lse: Floats
) -> Floats:
    """See ``reference.cross_entropy_backward``."""
    if not logits.flags.c_contiguous:
        found: Floats = reference.cross_entropy_backward(scale, logits, targets, first, lse)
        return found
    x, column, s, m = reference.rows(logits), _columns(targets, first), _column(scale, logits), _column(lse, logits)
    share(len(x), x.size, lambda a, b: _cross_entropy_backward(x[a:b], column[a:b], s[a:b], m[a:b]))
    return logits


def _column(x: Floats, like: Floats) -> Floats:
    return np.ascontiguousarray(x, like.dtype).reshape(-1)


def embedding_backward_weight(grad: Floats, ids: NDArray[np.integer], first: int, dy: Floats) -> None:
    """See ``reference.embedding_backward_weight``; a row's tokens are added in their order."""
    if not grad.flags.c_contiguous:
        reference.embedding_backward_weight(grad, ids, first, dy)
        return
    _embedding_backward_weight(grad, _columns(ids, first), reference.rows(np.ascontiguousarray(dy, grad.dtype)))


@jit
def _cross_entropy_parts(x: Floats, column: Integers, top: Floats, total: Floats, chosen: Floats) -> None:
    zero = x.dtype.type(0)
    for r in range(x.shape[0]):
        row = x[r]
        m, s = largest(row), zero
        shift = zero if m == -np.inf else m
        for i in range(row.size):
            s += exp(row[i] - shift)
        top[r], total[r] = m, s
        chosen[r] = row[column[r]] if 0 <= column[r] < row.size else zero


@jit
def _cross_entropy_backward(x: Floats, column: Integers, scale: Floats, lse: Floats) -> None:
    for r in range(x.shape[0]):
        row, m, factor = x[r], lse[r], scale[r]
        for i in range(row.size):
            row[i] = factor * exp(row[i] - m)
        if 0 <= column[r] < row.size:
            row[column[r]] -= factor


@jit
def _embedding_backward_weight(grad: Floats, row: Integers, dy: Floats) -> None:
    for t in range(row.size):
        if 0 <= row[t] < grad.shape[0]:
            target, source = grad[row[t]], dy[t]
            for i in range(target.size):
                target[i] += source[i]
