"""Kernels that are compositions of others, computed as these are in the set that they belong to: for sets that have
nothing better. Arguments beside ``k``, the set, are the kernel's own.
"""

from __future__ import annotations

from typing import Any

from ..arrays import Array


def matmul_onto(k: Any, x: Array, w: Array, onto: Array, bias: Array | None = None) -> Array:
    """onto + x w, or onto + x w + bias: ``matmul``, then ``add``. onto as the result."""
    y: Array = k.add(onto, k.matmul(x, w, bias))
    return y


def matmul_gelu(k: Any, x: Array, w: Array, bias: Array | None = None) -> tuple[Array, Array]:
    """(gelu(z), z), z = x w or x w + bias: ``matmul``, then ``gelu``, whose backward needs z."""
    z = k.matmul(x, w, bias)
    return k.gelu(z), z


def matmul_gelu_backward(k: Any, dy: Array, w: Array, z: Array) -> Array:
    """dz = (dy w^T) gelu'(z): from the y of gelu(z) w = y back to z. dy (..., o), w (i, o), z and dz (..., i)."""
    dz: Array = k.gelu_backward(k.matmul_transposed(dy, w), z)
    return dz


def add_outer_and_rows(k: Any, grad: Array, bias_grad: Array, x: Array, dy: Array) -> None:
    """grad += x^T dy and bias_grad += the sum of the rows of dy, in place: the gradients of ``matmul`` with respect to
    w and its bias."""
    k.add_outer(grad, x, dy)
    k.add_rows(bias_grad, dy)
