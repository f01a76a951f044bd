"""Kernels for NumPy arrays: the reference, and what is worth overriding.

NumPy makes a pass over memory for every operation. The overrides do the same operations on blocks that stay in the
second-level cache, into buffers that are used again, and so differ from the reference in rounding at most.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import blas, reference, update

_BLOCK = 1 << 15  # elements of a block: with a few temporaries of it, about the second-level cache


def matmul(
    x: NDArray[np.floating], w: NDArray[np.floating], bias: NDArray[np.floating] | None = None
) -> NDArray[np.floating]:
    """See ``reference.matmul``. The product is added to rows that hold the bias: a pass less than adding it after."""
    flat = reference.rows(x)
    if bias is None:
        y = blas.gemm(flat, w)
    else:
        y = np.empty((len(flat), w.shape[1]), x.dtype)
        y[...] = bias
        blas.gemm(flat, w, y, accumulate=True)
    return y.reshape(*x.shape[:-1], w.shape[1])


def matmul_transposed(dy: NDArray[np.floating], w: NDArray[np.floating]) -> NDArray[np.floating]:
    """See ``reference.matmul_transposed``."""
    return matmul(dy, w.T)


def add_outer(grad: NDArray[np.floating], x: NDArray[np.floating], dy: NDArray[np.floating]) -> None:
    """See ``reference.add_outer``."""
    blas.gemm(reference.rows(x).T, reference.rows(dy), grad, accumulate=True)


def square_sum(x: NDArray[np.floating]) -> float:
    """See ``reference.square_sum``."""
    flat = np.ascontiguousarray(x).reshape(-1)
    total = 0.0
    for a in range(0, flat.size, _BLOCK):
        block = flat[a : a + _BLOCK].astype(np.float64)
        total += float(block @ block)
    return total


def add_square_sum(total: NDArray[np.float64], x: NDArray[np.floating]) -> None:
    """See ``reference.add_square_sum``."""
    total += square_sum(x)


def gelu(x: NDArray[np.floating]) -> NDArray[np.floating]:
    """See ``reference.gelu``."""
    y = np.empty(x.shape, x.dtype)
    source, target = np.ascontiguousarray(x).reshape(-1), y.reshape(-1)
    for a in range(0, target.size, _BLOCK):
        target[a : a + _BLOCK] = reference.gelu(source[a : a + _BLOCK])
    return y


def gelu_backward(dy: NDArray[np.floating], x: NDArray[np.floating]) -> NDArray[np.floating]:
    """See ``reference.gelu_backward``."""
    dx = np.empty(x.shape, x.dtype)
    given, source, target = np.ascontiguousarray(dy).reshape(-1), np.ascontiguousarray(x).reshape(-1), dx.reshape(-1)
    for a in range(0, target.size, _BLOCK):
        b = a + _BLOCK
        target[a:b] = reference.gelu_backward(given[a:b], source[a:b])
    return dx


def adamw(
    data: NDArray[np.floating],
    grad: NDArray[np.floating],
    m: NDArray[np.floating],
    v: NDArray[np.floating],
    *,
    out: NDArray[Any] | None = None,
    **settings: Any,
) -> None:
    """See ``update.adamw``."""
    for a in range(0, data.size, _BLOCK):
        b = a + _BLOCK
        rounded = None if out is None else out[a:b]
        update.adamw(data[a:b], grad[a:b], m[a:b], v[a:b], out=rounded, **settings)


def orthogonalise(x: NDArray[np.floating]) -> NDArray[np.floating]:
    """See ``update.orthogonalise``."""
    made: NDArray[np.floating] = update.orthogonalise(x, multiply=blas.gemm)
    return made
