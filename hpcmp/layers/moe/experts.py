"""Experts: many MLPs at once, each over its own rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ... import kernels
from ...arrays import Array, array_module
from ...comm.base import Communicator
from ...module import DATA, Initial, Module, Parameter, constant
from ...wgrad import WGrad
from ..activation import GELU, SwiGLU
from ..parallel import ModelParallel


class Experts(Module):
    """y = down_e(activation(up_e(x))) for the rows of each expert e, summed over tp once the caller has left.

    x = (rows (m, h), sizes): the first ``sizes[0]`` rows belong to the first of this rank's experts, and so on; y
    (m, h) is this tp rank's summand. Weights up (experts, h, [2,] f) and down (experts, f, h), with f cut over tp and
    the experts over ``ep``, if it is given (else every rank holds them all, and they are copied as other weights are);
    the 2 are the gate and the up of SwiGLU (``gated``), else GELU. A bias of down is added by the first rank of tp.
    """

    def __init__(
        self,
        parallel: ModelParallel,
        features: int,
        ffn: int,
        experts: int,
        *,
        ep: Communicator | None = None,
        gated: bool = False,
        bias: bool = False,
        initial: Initial | None = None,
        leaving: Initial | None = None,
    ) -> None:
        first = parallel.tp.rank == 0
        held = slice(0, experts) if ep is None else ep.part(experts)
        inner: tuple[int, ...] = (2,) if gated else ()
        every, columns = slice(0, features), parallel.tp.part(ffn)
        gates = tuple(slice(0, n) for n in inner)

        def parameter(shape: tuple[int, ...], *index: slice, owned: bool = True, **settings: Any) -> Parameter:
            return Parameter(
                (experts, *shape),
                (held, *index),
                owned=(held if owned else slice(held.start, held.start), *index),
                replicas=DATA if ep is None else ("edp",),
                **settings,
            )

        shape = (features, *inner, ffn)
        self.up = parameter(shape, every, *gates, columns, initial=initial, matrix=(1, 1))
        self.down = parameter((ffn, features), columns, every, initial=leaving, matrix=(1, 1))
        self.biases: dict[str, Parameter] = {}
        if bias:
            zero: dict[str, Any] = {"initial": constant(0), "decay": False}
            self.biases["up_bias"] = parameter((*inner, ffn), *gates, columns, **zero)
            self.biases["down_bias"] = parameter((features,), every, owned=first, **zero)
        self.activation: Module = SwiGLU() if gated else GELU()
        self.first = first

    def forward(self, x: tuple[Array, Sequence[int]]) -> tuple[Array, Any]:
        rows, sizes = x
        k, up = kernels.of(rows), _matrices(self.up.data)
        inner = _grouped(k.matmul, rows, up, sizes, up.shape[2], self.biases.get("up_bias"))
        active, kept = self.activation.forward(inner.reshape(len(rows), *self.up.data.shape[2:]))
        added = self.biases.get("down_bias") if self.first else None
        y = _grouped(k.matmul, active, self.down.data, sizes, rows.shape[1], added)
        return y, (rows, sizes, active, kept)

    def backward(self, dy: Array, saved: Any, wgrad: WGrad) -> Array:
        rows, sizes, active, kept = saved
        transposed, up = kernels.of(dy).matmul_transposed, _matrices(self.up.data)
        dactive = _grouped(transposed, dy, self.down.data, sizes, active.shape[1])
        dinner = self.activation.backward(dactive, kept, wgrad).reshape(len(rows), up.shape[2])
        dx = _grouped(transposed, dinner, up, sizes, rows.shape[1])
        wgrad(self.backward_weight, rows, active, dinner, dy, sizes)
        return dx

    def backward_weight(self, rows: Array, active: Array, dinner: Array, dy: Array, sizes: Sequence[int]) -> None:
        """dW_e += X_e^T dY_e, db_e += sum dY_e: dy is whole on every rank of tp, so that down's bias owes no sum."""
        k = kernels.of(rows)
        for weight, x, d in ((self.up, rows, dinner), (self.down, active, dy)):
            for grad, s in zip(_matrices(weight.grad), _segments(sizes), strict=True):
                k.add_outer(grad, x[s], d[s])
        for bias, d in zip(self.biases.values(), (dinner, dy), strict=False):
            for grad, s in zip(bias.grad, _segments(sizes), strict=True):
                k.add_rows(grad.reshape(-1), d[s])


def _segments(sizes: Sequence[int]) -> list[slice]:
    """Each expert's rows."""
    return [slice(sum(sizes[:e]), sum(sizes[: e + 1])) for e in range(len(sizes))]


def _grouped(
    multiply: Callable[..., Array], x: Array, w: Array, sizes: Sequence[int], n: int, bias: Parameter | None = None
) -> Array:
    """Each expert's rows of ``x``, multiplied with its matrix, and its bias added, if there is one: (m, n)."""
    y = array_module(x).empty((len(x), n), x.dtype)
    for e, (matrix, s) in enumerate(zip(w, _segments(sizes), strict=True)):
        y[s] = multiply(x[s], matrix, *([] if bias is None else [bias.data[e].reshape(-1)]))
    return y


def _matrices(w: Array) -> Array:
    """(experts, rows, ...) as a stack of matrices; a view."""
    return w.reshape(*w.shape[:2], math.prod(w.shape[2:]))
