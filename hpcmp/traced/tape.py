"""The tape of one forward: which value was computed from which, and how gradients flow back.

The tape is cut in two. A value that depends on a differentiable input is pulled back in the B slot. A value that
depends on parameters alone is *late*: its gradient, and the product that leads to it, are wanted in the W slot only.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array, wide
from .shapes import Pullback, Shape


class Node(NamedTuple):
    """What is known of one value: not the value, which lives only while a pullback or the user's function holds it.

    sources: where its gradient goes, as (an operand's place on the tape, the pullback to that operand).
    """

    shape: Shape
    dtype: np.dtype[Any]
    late: bool
    sources: tuple[tuple[int, Pullback], ...] = ()


class Tape:
    """The values of one forward, in the order in which they were computed; good for one backward.

    gradients: those that have arrived, by place. waiting: (place, pullback, dy) that the W slot has still to compute.
    """

    def __init__(self, xp: ModuleType) -> None:
        self.xp = xp
        self.nodes: list[Node] = []
        self.gradients: dict[int, Array] = {}
        self.waiting: list[tuple[int, Pullback, Array]] = []
        self.used = False

    def record(self, node: Node) -> int:
        """The place of a new value."""
        self.nodes.append(node)
        return len(self.nodes) - 1

    def start(self, places: Sequence[int | None], gradients: Sequence[Array | None]) -> None:
        """Begin the one backward, with the gradients of the results; None for a result through which none flows."""
        if self.used:
            raise RuntimeError("backward has already run for this forward: what forward saved is good for one backward")
        self.used = True
        for place, gradient in zip(places, gradients, strict=True):
            if place is not None and gradient is not None:
                if np.shape(gradient) != self.nodes[place].shape:
                    raise ValueError(f"dy of shape {np.shape(gradient)} for y of shape {self.nodes[place].shape}")
                self._add(place, self.xp.asarray(gradient))

    def take(self, place: int) -> Array:
        """The whole gradient of an input or parameter, contiguous: zero if none has arrived."""
        node = self.nodes[place]
        gradient = self.gradients.pop(place, None)
        return self.xp.zeros(node.shape, node.dtype) if gradient is None else self.xp.asarray(gradient, order="C")

    def pull(self, late: bool) -> None:
        """Pull the gradients back, last value first, through the values that are late or those that are not."""
        while self.waiting:
            place, pullback, dy = self.waiting.pop()
            self._add(place, pullback(dy))
        for place in reversed(range(len(self.nodes))):
            node = self.nodes[place]
            if node.late != late or not node.sources:
                continue
            self.nodes[place] = node._replace(sources=())  # frees what its pullbacks hold
            if place not in self.gradients:
                continue
            dy = self.gradients.pop(place)
            for source, pullback in node.sources:
                if self.nodes[source].late == late:
                    self._add(source, pullback(dy))
                else:
                    self.waiting.append((source, pullback, dy))

    def _add(self, place: int, gradient: Array) -> None:
        """Add to a value's gradient, not in place: a pullback may hand one array to several values."""
        gradient = _fit(gradient, self.nodes[place])
        self.gradients[place] = self.gradients[place] + gradient if place in self.gradients else gradient


def _fit(gradient: Array, node: Node) -> Array:
    """The adjoint of broadcasting and of casting: ``gradient`` in the shape and dtype of ``node``."""
    extra = gradient.ndim - len(node.shape)
    long = [extra + i for i, n in enumerate(node.shape) if n == 1 != gradient.shape[extra + i]]
    axes = (*range(extra), *long)
    if axes:
        gradient = gradient.sum(axis=axes, dtype=wide(gradient.dtype)).reshape(node.shape)
    if gradient.shape != node.shape:
        raise ValueError(f"a gradient of shape {gradient.shape} for a value of shape {node.shape}")
    return gradient.astype(node.dtype, copy=False)
