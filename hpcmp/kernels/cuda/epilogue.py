"""Matrix products, and what is done to their results in the same pass: sums with another array, cuBLASLt's epilogues.

The epilogues are for arrays of 16 bits; where cuBLASLt has none (other types, widths that are no multiple of 8, or
without nvmath-python) kernels follow the product. cuBLASLt's GELU is taken for the tanh form, as ours.
"""

from __future__ import annotations

from ...arrays import Array, array_module, is_half
from .. import reference
from .activation import UNROLL, add, gelu, gelu_backward
from .gemm import add_outer, matmul, matmul_transposed
from .grid import lanes, like, tiles
from .launch import launch
from .multiply import adds_biases, fused, gemm
from .norm import add_rows


def matmul_onto(x: Array, w: Array, onto: Array, bias: Array | None = None) -> Array:
    """See ``composed.matmul_onto``; all is added before the result is rounded."""
    if not x.dtype == w.dtype == onto.dtype:
        return add(onto, matmul(x, w, bias))
    y = array_module(x).empty(onto.shape, onto.dtype)
    gemm(reference.rows(x), w, reference.rows(y), bias, onto=reference.rows(onto))
    return y


def matmul_gelu(x: Array, w: Array, bias: Array | None = None) -> tuple[Array, Array]:
    """See ``composed.matmul_gelu``. Where the product cannot add the bias, z is rounded before that as well."""
    found = _gelu_of_product(x, w, bias)
    if found is not None:
        return found
    if bias is None or adds_biases():
        z = matmul(x, w, bias)
        return gelu(z), z
    z = matmul(x, w)
    return _bias_gelu(z, bias), z


def matmul_gelu_backward(dy: Array, w: Array, z: Array) -> Array:
    """See ``composed.matmul_gelu_backward``."""
    found = _backward_of_product(dy, w, z)
    return gelu_backward(matmul_transposed(dy, w), z) if found is None else found


def add_outer_and_rows(grad: Array, bias_grad: Array, x: Array, dy: Array) -> None:
    """See ``composed.add_outer_and_rows``. The sums have the gradients' dtype, as cuBLASLt's have its result's."""
    sums = array_module(dy).empty(bias_grad.shape, bias_grad.dtype)
    x, dy = reference.rows(x), reference.rows(dy)
    if grad.dtype == sums.dtype == "float32" and fused(x.T, dy, grad, "sums", sums, accumulate=True):
        bias_grad += sums
    else:
        add_outer(grad, x, dy)
        add_rows(bias_grad, dy)


def _gelu_of_product(x: Array, w: Array, bias: Array | None) -> tuple[Array, Array] | None:
    if not is_half(x.dtype):
        return None
    xp, shape = array_module(x), (*x.shape[:-1], w.shape[1])
    y, z = xp.empty(shape, x.dtype), xp.empty(shape, x.dtype)
    done = fused(reference.rows(x), w, reference.rows(y), "gelu", bias, reference.rows(z))
    return (y, z) if done else None


def _backward_of_product(dy: Array, w: Array, z: Array) -> Array | None:
    if z.dtype != dy.dtype or not is_half(z.dtype):
        return None
    dz = array_module(z).empty(z.shape, z.dtype)
    done = fused(reference.rows(dy), w.T, reference.rows(dz), "dgelu", aux=reference.rows(z))
    return dz if done else None


def _bias_gelu(z: Array, bias: Array) -> Array:
    """z += bias (n,) on every row, in place, in a kernel that also makes gelu(z), which it returns. z is contiguous."""
    n, y = z.shape[-1], array_module(z).empty(z.shape, z.dtype)
    rows = z.size // n if n else 0
    grid, block, chunks = tiles(rows, n, lanes(z.dtype), UNROLL // 2)
    launch("activation", "bias_gelu", (z.dtype,), grid, block, z, like(z, bias), y, rows, n, chunks)
    return y
