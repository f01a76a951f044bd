"""Feed-forward layers whose GELU is a part of the matrix products on either side of it."""

from __future__ import annotations

from typing import Any

from .. import kernels
from ..arrays import Array
from ..module import Module, Sequential
from ..wgrad import WGrad
from .activation import GELU
from .linear import ColumnParallelLinear, RowParallelLinear
from .products import matrix


class GELUUp(ColumnParallelLinear):
    """``Sequential(up, GELU)`` in its forward, whose product makes both z and gelu(z), and ``up`` in its backward.

    It has the parameters of ``up``, which has one output and no sum over tp_y. x as there -> (gelu(z), z), each (S,
    batch, f); backward from dz, which ``GELUDown`` makes.
    """

    def __init__(self, up: ColumnParallelLinear) -> None:
        vars(self).update(vars(up))

    def forward(self, x: Array) -> tuple[tuple[Array, Array], Array]:
        (weight,), biases = self.weights.values(), list(self.biases.values())
        bias = biases[0].data.reshape(-1) if biases else None
        return kernels.of(x).matmul_gelu(self.enter(x), matrix(weight.data, 1), bias), x


class GELUDown(RowParallelLinear):
    """``down`` in its forward, and ``Sequential(GELU, down)`` in its backward, whose product makes dz.

    It has the parameters of ``down``, of one axis and no sum over tp_y. (gelu(z), z) -> y as there, and dy -> dz.
    """

    def __init__(self, down: RowParallelLinear) -> None:
        vars(self).update(vars(down))

    def forward(self, x: tuple[Array, Array]) -> tuple[Array, list[Array]]:
        active, z = x
        return super().forward(active)[0], [z, active]

    def forward_onto(self, x: tuple[Array, Array], onto: Array) -> tuple[Array, list[Array]]:
        active, z = x
        return super().forward_onto(active, onto)[0], [z, active]

    def backward(self, dy: Array, saved: list[Array], wgrad: WGrad) -> Array:
        whole = self.leave.T(dy)
        own = None if whole is dy else dy
        wgrad(self.backward_weight, saved.pop(), whole, own)  # first: it frees gelu(z), and there is nothing to hide
        dz: Array = kernels.of(dy).matmul_gelu_backward(whole, matrix(self.weight.data, 1), saved.pop())
        return dz


def fuse(block: Sequential) -> Sequential:
    """``block`` (of ``models.transformer.block``), changed: up, GELU and down of its MLP are one layer, of two products
    forward and four backward. No parameter's name changes, and no more is kept.

    Not where tp_y has several ranks, whose sums stand between the products and the GELU, nor where each linear has
    products of its own (``layers.products``): those of FP8.
    """
    for part in block.layers.values():
        if isinstance(part, Sequential):
            up, activation, down = (part.layers.get(name) for name in ("up", "activation", "down"))
            if type(up) is ColumnParallelLinear and type(activation) is GELU and type(down) is RowParallelLinear:
                if up.contract.comm.size == 1 and up.products is down.products:
                    part.group("up", "down", _fused)
    return block


def _fused(**layers: Any) -> Module:
    return Sequential(up=GELUUp(layers["up"]), down=GELUDown(layers["down"]))
