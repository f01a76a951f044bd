"""What the tests of layers share: layers of odd sizes with their inputs, and the checks that each must pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hpcmp.arrays import Array
from hpcmp.comm.base import Communicator
from hpcmp.cursor import Cursor, Place
from hpcmp.layers.parallel import ModelParallel
from hpcmp.module import Module
from hpcmp.testing import activations, equals_serial, gradcheck
from hpcmp.wgrad import WGrad

BATCH = 2


def place(length: int, tp: Communicator | None = None, *, sequence: bool = False, **changes: Any) -> ModelParallel:
    """A group, and a cursor at a step and samples that are not the first."""
    cursor = Cursor(seed=11)
    cursor.place = replace(Place(3, np.array([7, 4]), length), **changes)
    return ModelParallel(tp, cursor, sequence=sequence)


def draw(*shape: int) -> Array:
    return np.random.default_rng(shape).normal(size=shape)


@dataclass(frozen=True)
class Case:
    """A layer: how it is built, the shape of its whole input after (S, batch), and what a rank holds of both ends.

    layout: "A" where an end lies as the activations between layers do (V or I, with or without sequence parallelism),
    else V or I. x: makes the whole input from S where it is not simply real numbers.
    """

    build: Callable[[ModelParallel], Module]
    shape: tuple[int, ...] = (6,)
    layout: str = "AA"
    cut_x: Callable[[Any, ModelParallel], Any] = activations
    cut_y: Callable[[Any, ModelParallel], Any] = activations
    x: Callable[[int], Any] | None = None

    def input(self, length: int) -> Any:
        """The whole input."""
        return self.x(length) if self.x else draw(length, BATCH, *self.shape)

    def check_serial(self, length: int = 5) -> None:
        """Backward against central differences on one rank."""
        gradcheck(self.build(place(length)), self.input(length))

    def check_equal(self, parallel: ModelParallel) -> dict[str, float]:
        """The layout of ``parallel`` against one rank."""
        x = self.input(parallel.cursor.place.length)
        return equals_serial(self.build, parallel, x, cut_x=self.cut_x, cut_y=self.cut_y)

    def check_gradients(self, parallel: ModelParallel) -> None:
        """Backward against central differences, on several ranks."""
        between = "V" if parallel.sequence else "I"
        x = self.cut_x(self.input(parallel.cursor.place.length), parallel)
        gradcheck(
            self.build(parallel), x, layout=self.layout.replace("A", between), comm=parallel.tp, elementwise=0, seed=1
        )

    def check_dtype(self) -> None:
        """Single precision in, single precision out, forward and backward."""
        module = self.build(place(5))
        module.initialise(0, np.float32)
        single = [v.astype(np.float32) if v.dtype == np.float64 else v for v in _arrays(self.input(5))]
        y, saved = module.forward(tuple(single) if isinstance(self.input(5), tuple) else single[0])
        dy = [np.ones_like(v) for v in _arrays(y)]
        dx = module.backward(tuple(dy) if isinstance(y, tuple) else dy[0], saved, lambda fn, *args: fn(*args))
        assert {v.dtype for v in _arrays(dx)} <= {np.dtype(np.float32)}
        if np.ndim(y) or isinstance(y, tuple):
            assert {v.dtype for v in _arrays(y)} == {np.dtype(np.float32)}
        assert {p.grad.dtype for p in module.parameters()} <= {np.dtype(np.float32)}

    def check_weight_gradients(self) -> None:
        """Every module that holds parameters calls ``wgrad`` exactly once, and adds no gradient by itself."""
        module = self.build(place(5))
        parameters = module.initialise(0, np.float64)
        y, saved = module.forward(self.input(5))
        dy = [np.ones_like(v) for v in _arrays(y)]
        called: list[Any] = []
        module.backward(
            tuple(dy) if isinstance(y, tuple) else dy[0], saved, lambda fn, *args: called.append(fn.__self__)
        )
        assert sorted(map(id, called)) == sorted({id(holder) for _, holder, _ in module.walk()})
        assert not any(p.grad.any() for p in parameters)


class Copied(Module):
    """The identity, by copies: before and after a layer that writes over what it is given (see ``hpcmp.module``)."""

    def forward(self, x: Any) -> tuple[Any, None]:
        return (tuple(v.copy() for v in x) if isinstance(x, tuple) else x.copy()), None

    def backward(self, dy: Any, saved: None, wgrad: WGrad) -> Any:
        return tuple(None if v is None else v.copy() for v in dy) if isinstance(dy, tuple) else dy.copy()


def _arrays(value: Any) -> list[Array]:
    if value is None:
        return []
    return [leaf for item in value for leaf in _arrays(item)] if isinstance(value, tuple) else [value]
