"""Normalisation over the hidden axis, on activations that may be sharded over the sequence and over hidden."""

from __future__ import annotations

from typing import Any

from .. import kernels
from ..arrays import Array, array_module
from ..module import Module, constant
from ..wgrad import WGrad
from .parallel import ModelParallel


class LayerNorm(Module):
    """y = (x - mean) / sqrt(var + epsilon) * w + b over the last axis. Ba, Kiros and Hinton, 2016.

    x and y (..., h), h this rank's share over tp_y of ``hidden``, over all of which mean and var are taken: two sums
    over tp_y of a number a row in the forward, one of two numbers a row in the backward. w and b (h,) are without
    weight decay.
    """

    def __init__(self, parallel: ModelParallel, hidden: int, epsilon: float = 1e-5) -> None:
        self.epsilon, self.means = epsilon, _means(parallel, hidden)
        self.weight = parallel.replicated(hidden, hidden=0, initial=constant(1), decay=False)
        self.bias = parallel.replicated(hidden, hidden=0, initial=constant(0), decay=False)

    def forward(self, x: Array) -> tuple[Array, Any]:
        y, mean, rstd = kernels.of(x).layer_norm(x, self.weight.data, self.bias.data, self.epsilon, **self.means)
        return y, (x, mean, rstd)

    def backward(self, dy: Array, saved: Any, wgrad: WGrad) -> Array:
        return self.backward_onto(dy, saved, wgrad, None)

    def backward_onto(self, dy: Array, saved: Any, wgrad: WGrad, onto: Array | None) -> Array:
        x, mean, rstd = saved
        wgrad(self.backward_weight, dy, x, mean, rstd)
        return kernels.of(x).layer_norm_backward(dy, x, self.weight.data, mean, rstd, **self.means, onto=onto)

    def backward_weight(self, dy: Array, x: Array, mean: Array, rstd: Array) -> None:
        """dw += sum dy z, db += sum dy."""
        dw, db = kernels.of(x).layer_norm_backward_weight(dy, x, mean, rstd)
        self.weight.grad += dw
        self.bias.grad += db


class RMSNorm(Module):
    """y = x / sqrt(mean(x^2) + epsilon) * w over the last axis. Zhang and Sennrich, 2019.

    x and y (..., h), h this rank's share over tp_y of ``hidden``, over all of which the mean is taken: one sum over
    tp_y of a number a row, forward and backward. w (h,) is without weight decay.
    """

    def __init__(self, parallel: ModelParallel, hidden: int, epsilon: float = 1e-5) -> None:
        self.epsilon, self.means = epsilon, _means(parallel, hidden)
        self.weight = parallel.replicated(hidden, hidden=0, initial=constant(1), decay=False)

    def forward(self, x: Array) -> tuple[Array, Any]:
        y, rstd = kernels.of(x).rms_norm(x, self.weight.data, self.epsilon, **self.means)
        return y, (x, rstd)

    def backward(self, dy: Array, saved: Any, wgrad: WGrad) -> Array:
        return self.backward_onto(dy, saved, wgrad, None)

    def backward_onto(self, dy: Array, saved: Any, wgrad: WGrad, onto: Array | None) -> Array:
        x, rstd = saved
        wgrad(self.backward_weight, dy, x, rstd)
        return kernels.of(x).rms_norm_backward(dy, x, self.weight.data, rstd, **self.means, onto=onto)

    def backward_weight(self, dy: Array, x: Array, rstd: Array) -> None:
        """dw += sum dy z."""
        self.weight.grad += kernels.of(x).rms_norm_backward_weight(dy, x, rstd)


def _means(parallel: ModelParallel, hidden: int) -> dict[str, Any]:
    """What tells a kernel how to take means over hidden: nothing where a rank has all of it, so that the kernel does it
    in its own way, else sums over tp_y, of several arrays in one message."""

    def means(*xs: Array) -> list[Array]:
        sums = array_module(xs[0]).stack([x.sum(-1, keepdims=True) for x in xs])
        return list(parallel.contract(sums) / hidden)

    return {"means": means} if parallel.tp_y.size > 1 else {}
