"""Matrix products of arrays on a GPU, by ``multiply``.

16-bit arrays are multiplied as they are: sums are float32, and the result is rounded once.
"""

from __future__ import annotations

import numpy as np

from ...arrays import Array, array_module, is_half
from .. import reference, update
from .multiply import gemm


def matmul(x: Array, w: Array, bias: Array | None = None) -> Array:
    """See ``reference.matmul``; the bias is added before the result is rounded."""
    a, b = _alike(reference.rows(x), w)
    y = array_module(x).empty((a.shape[0], b.shape[1]), a.dtype)
    gemm(a, b, y, bias)
    return y.reshape(*x.shape[:-1], w.shape[1]).astype(x.dtype, copy=False)


def matmul_transposed(dy: Array, w: Array) -> Array:
    """See ``reference.matmul_transposed``."""
    return matmul(dy, w.T)


def add_outer(grad: Array, x: Array, dy: Array) -> None:
    """See ``reference.add_outer``; in place, from 16 bits into float32 too. TypeError for a 16-bit ``grad``."""
    if is_half(grad.dtype):
        raise TypeError(f"add_outer: adding up in {grad.dtype} loses what is added; give it a float32 array")
    a, b = _alike(reference.rows(x), reference.rows(dy))
    gemm(a.T, b, grad, accumulate=True)


def orthogonalise(x: Array) -> Array:
    """See ``update.orthogonalise``."""
    return update.orthogonalise(x, multiply=_times)


def _alike(a: Array, b: Array) -> tuple[Array, Array]:
    """Both in the wider's dtype."""
    if a.dtype == b.dtype:
        return a, b
    dtype = np.promote_types(a.dtype, b.dtype)
    return a.astype(dtype, copy=False), b.astype(dtype, copy=False)


def _times(a: Array, b: Array) -> Array:
    out = array_module(a).empty((a.shape[0], b.shape[1]), a.dtype)
    gemm(a, b, out)
    return out
