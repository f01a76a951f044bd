"""Element-wise activations between the two linears of a feed-forward layer."""

from __future__ import annotations

from .. import kernels
from ..arrays import Array
from ..module import Module
from ..wgrad import WGrad


class GELU(Module):
    """y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))). Hendrycks and Gimpel, 2016. x and y (..., f)."""

    def forward(self, x: Array) -> tuple[Array, Array]:
        return kernels.of(x).gelu(x), x

    def backward(self, dy: Array, saved: Array, wgrad: WGrad) -> Array:
        return kernels.of(dy).gelu_backward(dy, saved)


class SwiGLU(Module):
    """y = g sigmoid(g) u, x (..., 2, f) holding g and u, y (..., f). Shazeer, "GLU variants", 2020."""

    def forward(self, x: Array) -> tuple[Array, Array]:
        return kernels.of(x).swiglu(x), x

    def backward(self, dy: Array, saved: Array, wgrad: WGrad) -> Array:
        return kernels.of(dy).swiglu_backward(dy, saved)
