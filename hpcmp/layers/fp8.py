"""Linears that multiply in FP8: x and weights in E4M3, gradients of activations in E5M2 (``hpcmp.kernels.fp8``).

Every tensor has one scale, of this rank's part of it. The scale of a weight is made from the weight itself, once a
step. That of an x or a dy is made, with "current" scaling, from the array at hand, which is then read twice; with
"delayed" from the largest magnitudes of the tensor, over all ranks and microbatches, in each of the last 16 steps, so
that it is read once, and quantised while its own largest is noted. A tensor of which there are no such steps, or only
ones in which it was zero, is scaled as with "current"; the device decides that, so that the host waits for nothing.

Scales are powers of two, and so a number is rounded alike whatever part of its tensor lies on a rank, unless it lies
2^14 (x, weights) or 2^29 (dy) under the largest: which scale it is decides nothing else, and layouts agree to rounding.

A linear keeps the codes of x^T, which one kernel makes with those of x: x is read once, and gone after the forward.
Where x stays for another reason that is what it keeps, and quantises again for the weight's gradient: the result of
attention, which that keeps itself; what ``hpcmp.recompute`` makes again; a shard that sequence parallelism gathers
again. Of dy, the codes of dy^T and sums of rows wait for the weight's gradient and the bias's. Micikevicius et al.,
"FP8 formats for deep learning", 2022; delayed scaling as in NVIDIA's Transformer Engine.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from .. import kernels
from ..arrays import Array, array_module
from ..comm.base import Communicator
from ..kernels.fp8 import SUMMED
from ..module import Parameter
from .products import LinearProducts, Products, matrix

HISTORY = 16  # steps


@dataclass
class Factor:
    """A matrix (m, n) in 8 bits: its codes and those of its transpose, of which one may be None, and 1 / scale.

    sums: where they are wanted, of each ``SUMMED`` rows. shape and dtype: of the array (..., n) that it was made of.
    """

    codes: Array
    turned: Array
    inverse: Array
    format: str
    shape: tuple[int, ...]
    dtype: Any
    sums: Array = None


class Fp8(Products):
    """FP8 for all linears of a rank.

    delayed: whether scales are; else they are current. comm: the ranks that share the layers of this one, whatever they
    share of them. xp: the module of the arrays.
    """

    def __init__(self, comm: Communicator, xp: ModuleType, *, delayed: bool) -> None:
        self.comm, self.xp, self.delayed = comm, xp, delayed
        self.linears: list[Fp8Linear] = []

    def linear(self, weights: Sequence[Parameter], rows: int) -> LinearProducts:
        found = Fp8Linear(self, list(weights), rows, sum(each.tensors for each in self.linears))
        self.linears.append(found)
        return found

    @functools.cached_property
    def magnitudes(self) -> tuple[Array, Array, Array]:
        """Of every tensor: of the last steps, the largest of these, and of this step so far (see
        ``kernels.fp8.shift_history``). Made when they are first asked for, when all linears are known."""
        tensors = sum(each.tensors for each in self.linears)
        history, largest, seen = (self.xp.zeros(n, np.float32) for n in (tensors * HISTORY, tensors, tensors))
        return history.reshape(tensors, HISTORY), largest, seen

    def begin(self) -> None:
        """Weights that have changed are quantised, in the memory of the old ones, for all microbatches."""
        if self.delayed:
            self.magnitudes[2][...] = 0  # what is there is of microbatches that were evaluated, or looked into
        for linear in self.linears:
            for weight in linear.weights:
                if weight.data is not None:  # else it comes when it is used (ZeRO stage 3)
                    quantised(weight, linear.rows)

    def advance(self, factor: Array) -> None:
        if self.delayed and self.linears:
            history, largest, seen = self.magnitudes
            self.comm.all_reduce(seen, "max", out=seen).wait()
            kernels.of(seen).shift_history(history, largest, seen, factor)

    def state(self) -> Iterator[tuple[str, Array]]:
        """With delayed scaling, the histories (tensors of a linear, steps), named by the linear's first weight."""
        if self.delayed:
            for linear in self.linears:
                first = linear.first
                yield f"fp8/{linear.weights[0].name}", self.magnitudes[0][first : first + linear.tensors]

    def loaded(self, complete: bool) -> None:
        if self.delayed:
            history, largest, _ = self.magnitudes
            if not complete:
                history[...] = 0
            largest[...] = history.max(1)


class Fp8Linear(LinearProducts):
    """The products of one linear. Its tensors are x, then each dy: those of ``Fp8.magnitudes`` from ``first`` on."""

    def __init__(self, of: Fp8, weights: list[Parameter], rows: int, first: int) -> None:
        self.of, self.weights, self.rows, self.first = of, weights, rows, first
        self.tensors = 1 + len(weights)

    def input(self, x: Array, stays: bool = False) -> tuple[Factor, Any]:
        made = self._factor(x, self.first, "e4m3", columns=not stays)
        kept, made.turned = (made.turned, made.inverse), None  # what the product reads is gone after it
        return made, x if stays else kept

    def outer(self, kept: Any) -> Factor:
        if isinstance(kept, tuple):
            return Factor(None, kept[0], kept[1], "e4m3", (), None)
        return self._factor(kept, self.first, "e4m3", rows=False)

    def gradient(self, dy: Array, weight: Parameter, bias: bool = False) -> Factor:
        place = next(i for i, each in enumerate(self.weights) if each is weight)
        return self._factor(dy, self.first + 1 + place, "e5m2", summed=bias)

    def forward(self, x: Factor, weight: Parameter, rows: int, bias: Array | None, onto: Array | None = None) -> Array:
        w = quantised(weight, rows)
        y = self._product(x.codes, w.turned, x, w, (*x.shape[:-1], len(w.turned)), bias)
        return y if onto is None else kernels.of(y).add(onto, y)

    def backward(self, dy: Factor, weight: Parameter, rows: int, onto: Array | None = None) -> Array:
        w = quantised(weight, rows)
        dx = self._product(dy.codes, w.codes, dy, w, (*dy.shape[:-1], len(w.codes)))
        dy.codes = None  # what is left waits for the weight's gradient
        return dx if onto is None else kernels.of(dx).add(onto, dx)

    def add_outer(
        self,
        weight: Parameter,
        rows: int,
        x: Factor,
        factor: Factor,
        bias_grad: Array | None = None,
        dy: Array | None = None,
    ) -> None:
        grad = matrix(weight.grad, rows)
        scales, formats = (x.inverse, factor.inverse), (x.format, factor.format)
        kernels.of(grad).fp8_product(grad, x.turned, factor.turned, *scales, formats, accumulate=True)
        if bias_grad is not None:
            summed = factor.sums if dy is None else dy
            kernels.of(summed).add_rows(bias_grad, summed)

    def _product(
        self, a: Array, b: Array, x: Factor, w: Factor, shape: tuple[int, ...], bias: Array | None = None
    ) -> Array:
        out = self.of.xp.empty((len(a), shape[-1]), x.dtype)
        kernels.of(out).fp8_product(out, a, b, x.inverse, w.inverse, (x.format, w.format), bias)
        return out.reshape(shape)

    def _factor(
        self, x: Array, tensor: int, format: str, *, rows: bool = True, columns: bool = True, summed: bool = False
    ) -> Factor:
        k, flat, known, record, sums = kernels.of(x), matrix(x, x.ndim - 1), None, None, None
        if self.of.delayed:
            known, seen = (each[tensor : tensor + 1] for each in self.of.magnitudes[1:])
            record = seen if rows else None
        if summed:
            sums = self.of.xp.empty((-(-len(flat) // SUMMED), flat.shape[1]), np.float32)
        largest = self.of.xp.zeros(1, np.float32)
        k.add_amax(largest, flat, known)
        made = k.quantise(flat, largest, format, rows, columns, record, sums=sums)
        return Factor(made[0], made[1], made[2], format, x.shape, x.dtype, sums)


def quantised(weight: Parameter, rows: int) -> Factor:
    """A weight in FP8, as it lies and transposed: kept with it, and made anew once it has changed."""
    if weight.derived is None or weight.derived[0] != weight.version:
        flat, k = matrix(weight.data, rows), kernels.of(weight.data)
        before: Factor | None = None if weight.derived is None else weight.derived[1]
        largest = array_module(flat).zeros(1, np.float32)
        k.add_amax(largest, flat)
        out = before and (before.codes, before.turned, before.inverse)
        made = k.quantise(flat, largest, "e4m3", True, True, out=out)
        weight.derived = weight.version, Factor(made[0], made[1], made[2], "e4m3", flat.shape, flat.dtype)
    found: Factor = weight.derived[1]
    return found
