"""Normalisation over the hidden axis, on activations that may be sharded over the sequence."""

from __future__ import annotations

from typing import Any

from .. import kernels
from ..arrays import Array
from ..module import Module, constant
from ..wgrad import WGrad
from .parallel import ModelParallel


class LayerNorm(Module):
    """y = (x - mean) / sqrt(var + epsilon) * w + b over the last axis. Ba, Kiros and Hinton, 2016.

    x and y (..., hidden). w and b are whole on every rank, without weight decay.
    """

    def __init__(self, parallel: ModelParallel, hidden: int, epsilon: float = 1e-5) -> None:
        self.epsilon = epsilon
        self.weight = parallel.replicated(hidden, initial=constant(1), decay=False)
        self.bias = parallel.replicated(hidden, initial=constant(0), decay=False)

    def forward(self, x: Array) -> tuple[Array, Any]:
        y, mean, rstd = kernels.of(x).layer_norm(x, self.weight.data, self.bias.data, self.epsilon)
        return y, (x, mean, rstd)

    def backward(self, dy: Array, saved: Any, wgrad: WGrad) -> Array:
        x, mean, rstd = saved
        wgrad(self.backward_weight, dy, x, mean, rstd)
        return kernels.of(x).layer_norm_backward(dy, x, self.weight.data, mean, rstd)

    def backward_weight(self, dy: Array, x: Array, mean: Array, rstd: Array) -> None:
        """dw += sum dy z, db += sum dy."""
        dw, db = kernels.of(x).layer_norm_backward_weight(dy, x, mean, rstd)
        self.weight.grad += dw
        self.bias.grad += db


class RMSNorm(Module):
    """y = x / sqrt(mean(x^2) + epsilon) * w over the last axis. Zhang and Sennrich, 2019.

    x and y (..., hidden). w is whole on every rank, without weight decay.
    """

    def __init__(self, parallel: ModelParallel, hidden: int, epsilon: float = 1e-5) -> None:
        self.epsilon = epsilon
        self.weight = parallel.replicated(hidden, initial=constant(1), decay=False)

    def forward(self, x: Array) -> tuple[Array, Any]:
        y, rstd = kernels.of(x).rms_norm(x, self.weight.data, self.epsilon)
        return y, (x, rstd)

    def backward(self, dy: Array, saved: Any, wgrad: WGrad) -> Array:
        x, rstd = saved
        wgrad(self.backward_weight, dy, x, rstd)
        return kernels.of(x).rms_norm_backward(dy, x, self.weight.data, rstd)

    def backward_weight(self, dy: Array, x: Array, rstd: Array) -> None:
        """dw += sum dy z."""
        self.weight.grad += kernels.of(x).rms_norm_backward_weight(dy, x, rstd)
