"""Traced: a layer or loss written as plain array expressions, without a hand-written backward.

    def cross_entropy(logits, targets):
        shifted = logits - logits.max(-1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        return -np.take_along_axis(log_p, targets[..., None], -1).mean()

    loss, saved = Traced(cross_entropy).forward((logits, targets))

A small tape inside one leaf of the explicit engine, behind the same forward and backward as every other module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ..arrays import Array, array_module, wide
from ..module import Module, Parameter
from ..wgrad import WGrad
from .rules import CONSTANT, RULES
from .tape import Node, Tape
from .tracer import Tracer, is_float, stop_gradient


class Saved(NamedTuple):
    """What a forward of ``Traced`` keeps: the tape, and the places on it; None for what has no gradient."""

    tape: Tape
    inputs: tuple[int | None, ...]
    weights: tuple[int, ...]
    outputs: tuple[int | None, ...]
    several: bool


class Traced(Module):
    """y = fn(x, **parameters), differentiated by the chain rule over the functions that fn calls.

    fn is written with NumPy's operators, functions and methods, and works on NumPy and CuPy arrays alike. ``RULES``
    holds the functions that it may call, and can be added to; anything else raises TypeError, as does what would change
    a traced array in place or turn it into a plain one. The results of comparisons and of the other functions in
    ``CONSTANT`` are constants; so is every array that fn has from elsewhere, the parameters of another module that fn
    calls among them. fn must not change an array that it has used. CuPy refuses ``constant @ traced``: write np.matmul.

    x: an array, or a tuple of arrays: fn(*x, **parameters). Integer and boolean arrays reach fn as they are and get no
    gradient. y: an array, or a tuple of arrays, as fn returns it. dx and dy are arrays or tuples as x and y are, with
    None where there is no gradient; each has the shape and dtype of its array. The gradient of a maximum is shared
    equally between ties.

    The B slot computes dx; the W slot computes whatever leads to parameters alone. What a forward saved is good for one
    backward; the forwards and backwards of several microbatches may come in any order. What is saved is what the rules
    name, so that an intermediate array which no rule needs is freed as soon as fn drops it.
    """

    def __init__(self, fn: Callable[..., Any], /, **parameters: Parameter) -> None:
        self.fn = fn
        self.weights = parameters

    def forward(self, x: Any) -> tuple[Any, Saved]:
        several = isinstance(x, tuple)
        arrays = x if several else (x,)
        for array in arrays:
            if isinstance(array, Tracer) or not hasattr(array, "dtype"):
                raise TypeError(f"x must be an array or a tuple of arrays, not {type(array).__name__}")
        tape = Tape(array_module(arrays[0]))
        inputs = [_input(tape, array) for array in arrays]
        weights = {name: _weight(tape, name, parameter) for name, parameter in self.weights.items()}
        y = self.fn(*inputs, **weights)
        outputs = y if isinstance(y, tuple) else (y,)
        for output in outputs:
            _check_output(tape, output)
        saved = Saved(
            tape, _places(inputs), tuple(weight.place for weight in weights.values()), _places(outputs), several
        )
        values = tuple(stop_gradient(output) for output in outputs)
        return values if isinstance(y, tuple) else values[0], saved

    def backward(self, dy: Any, saved: Saved, wgrad: WGrad) -> Any:
        saved.tape.start(saved.outputs, dy if isinstance(dy, tuple) else (dy,))
        saved.tape.pull(late=False)
        dx = tuple(None if place is None else saved.tape.take(place) for place in saved.inputs)
        if self.weights:
            wgrad(self.backward_weight, saved)
        return dx if saved.several else dx[0]

    def backward_weight(self, saved: Saved) -> None:
        """Add the parameters' gradients to ``grad``."""
        saved.tape.pull(late=True)
        for parameter, place in zip(self.weights.values(), saved.weights, strict=True):
            parameter.grad += saved.tape.take(place)


def _input(tape: Tape, array: Array) -> Array | Tracer:
    if not is_float(array.dtype):
        return array
    return Tracer(array, tape, tape.record(Node(array.shape, array.dtype, late=False)))


def _weight(tape: Tape, name: str, parameter: Parameter) -> Tracer:
    if parameter.data is None:
        raise ValueError(f"parameter {parameter.name or name} has no value yet: call initialise() first")
    return Tracer(parameter.data, tape, tape.record(Node(parameter.data.shape, wide(parameter.data.dtype), late=True)))


def _check_output(tape: Tape, output: Any) -> None:
    if isinstance(output, Tracer) and output.tape is not tape:
        raise TypeError("the traced function returned an array that it kept from another call")
    if isinstance(output, list | dict) or output is None:
        raise TypeError(f"a traced function must return an array or a tuple of arrays, not {type(output).__name__}")


def _places(arrays: Iterable[Any]) -> tuple[int | None, ...]:
    return tuple(array.place if isinstance(array, Tracer) else None for array in arrays)


__all__ = ["CONSTANT", "RULES", "Traced", "stop_gradient"]
