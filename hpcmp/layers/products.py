"""How the linears of a model multiply: the one place that knows in which numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from .. import kernels
from ..arrays import Array
from ..module import Parameter


class LinearProducts:
    """The three products of a linear, by the kernels of its arrays, in their dtype.

    ``input`` and ``gradient`` make of x (..., i) and dy (..., o) what is multiplied, here themselves; weights are
    ``Parameter`` s of which the first ``rows`` axes make the i rows of a matrix (i, o).
    """

    def input(self, x: Array, stays: bool = False) -> tuple[Any, Any]:
        """x as ``forward`` takes it, and what is to be kept of it: x itself, as always where it ``stays`` for another
        reason, or a tuple of arrays."""
        return x, x

    def outer(self, kept: Any) -> Any:
        """What was to be kept of x, or x itself, as ``add_outer`` takes it."""
        return kept

    def gradient(self, dy: Array, weight: Parameter, bias: bool = False) -> Any:
        """The gradient of what ``weight`` made, as ``backward`` and ``add_outer`` take it, from which the latter can
        tell that of a ``bias``."""
        return dy

    def forward(self, x: Any, weight: Parameter, rows: int, bias: Array | None, onto: Array | None = None) -> Array:
        """y = x w, + bias, + onto, of these what is there: (..., o)."""
        k, w = kernels.of(x), matrix(weight.data, rows)
        y: Array = k.matmul(x, w, bias) if onto is None else k.matmul_onto(x, w, onto, bias)
        return y

    def backward(self, dy: Any, weight: Parameter, rows: int, onto: Array | None = None) -> Array:
        """dx = dy w^T, + onto if that is there: (..., i)."""
        k, w = kernels.of(dy), matrix(weight.data, rows)
        dx: Array = k.matmul_transposed(dy, w) if onto is None else k.matmul_onto(dy, w.T, onto)
        return dx

    def add_outer(
        self, weight: Parameter, rows: int, x: Any, factor: Any, bias_grad: Array | None = None, dy: Array | None = None
    ) -> None:
        """dw += x^T dy, into ``weight.grad``, of what ``outer`` and ``gradient`` made; and bias_grad += the sum of the
        rows of what ``factor`` was made of or, given that, of ``dy``."""
        k, grad = kernels.of(x), matrix(weight.grad, rows)
        if bias_grad is not None and dy is None:
            k.add_outer_and_rows(grad, bias_grad, x, factor)
            return
        k.add_outer(grad, x, factor)
        if bias_grad is not None:
            k.add_rows(bias_grad, dy)


class Products:
    """What all linears of a rank multiply with (``ModelParallel.products``): ``linear`` gives each its own.

    Here all share one, without any state, in whose place layers may call other kernels that make the same products.
    """

    def linear(self, weights: Sequence[Parameter], rows: int) -> LinearProducts:
        """For a linear of one input that has these weights, each a matrix by its first ``rows`` axes."""
        return _PLAIN

    def begin(self) -> None:
        """Microbatches are about to be computed, with the weights that are there."""

    def advance(self, factor: Array) -> None:
        """A step has ended, or come to nothing if ``factor`` (1,), which is where the gradients are, is NaN. Collective
        over the ranks that share the layers; the host waits for nothing."""

    def state(self) -> Iterator[tuple[str, Array]]:
        """(name, array) of what a checkpoint keeps, the same on all ranks that share the layers."""
        yield from ()

    def loaded(self, complete: bool) -> None:
        """The arrays of ``state`` have been filled from a checkpoint or, unless it was ``complete``, are to be as in a
        run that begins."""


_PLAIN = LinearProducts()


def matrix(x: Array, axes: int, keep: bool = False) -> Array:
    """``x`` with its first ``axes`` axes made one (or kept as they are) and the rest made one; sizes may be zero."""
    columns = math.prod(x.shape[axes:])
    return x.reshape(*x.shape[:axes], columns) if keep else x.reshape(math.prod(x.shape[:axes]), columns)
