"""Blocks whose launches are captured in CUDA graphs and replayed: a microbatch's forward and backward are a call each.

A graph is of one input's shape, and reads and writes at addresses of its own. So a block has, for each shape, as many
slots as microbatches are in flight: from a forward to the end of its backward or, in schedules that put them off, of
its weight gradients. Arrays that blocks hand to each other are copied once.

docs/gpu.md says what that costs and what cannot be captured. ``kernels.cuda.graphs`` captures.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from operator import is_
from types import MethodType
from typing import Any

from .arrays import Array, array_module
from .kernels.cuda.graphs import Backend, Cupy, Recording, record
from .module import Module, Parameter, Sequential
from .wgrad import Queue, WGrad

#: An input's shape and dtype.
Key = tuple[tuple[int, ...], Any]


class Graphs:
    """What the captured blocks of a rank share: what captures (on a GPU, unless given) and, by shape, where a backward
    finds dy, which is of no use after it."""

    def __init__(self, backend: Backend | None = None) -> None:
        self.backend: Backend = backend or Cupy()
        self.dy: dict[Key, Array] = {}


class Captured(Module):
    """f, of one array, replayed once it has run; its weights and gradients must stay where they are.

    With each shape of its input f runs once as it is, forward and backward, whereby kernels are compiled and products
    planned; so do microbatches that begin before that is over. Then it is captured. Where a parameter's ``data`` or
    ``grad`` is another array than it was at the capture, it is captured anew.

    ``wgrad`` is called for each module as that itself would: after the backward, or after the graph that makes all
    weight gradients of the block, which a ``Queue`` gets before them.
    """

    def __init__(self, inner: Module, graphs: Graphs) -> None:
        self.inner, self.graphs = inner, graphs
        #: Whether what comes before, or after, is captured too: such a neighbour copies at once what it is handed.
        self.before = self.after = False
        self.warm: set[Key] = set()
        self.free: dict[Key, list[Slot]] = {}
        self.plans: dict[tuple[Key, str], frozenset[int]] = {}

    def members(self) -> Any:
        yield "", self.inner  # capturing changes no parameter's name

    def forward(self, x: Array) -> tuple[Array, Any]:
        key = x.shape, x.dtype
        if key not in self.warm:
            y, saved = self.inner.forward(x.copy() if self.before else x)
            return y, (key, saved)
        free = self.free.setdefault(key, [])
        slot = free.pop() if free else Slot(self, key, x)
        lease = Lease(slot, free)
        y = slot.forward(x)
        return y if self.after else y.copy(), lease

    def backward(self, dy: Array, saved: Any, wgrad: WGrad) -> Array:
        if not isinstance(saved, Lease):
            key, kept = saved
            dx: Array = self.inner.backward(dy.copy() if self.after else dy, kept, wgrad)
            wgrad(self._ran, key)
            return dx
        if isinstance(wgrad, Queue):
            dx, modules = saved.slot.backward_without_weights(dy)
            wgrad(self.backward_weight, saved)
        else:
            dx, modules = saved.slot.backward(dy)
        for module in modules:
            wgrad(MethodType(_computed, module))
        return dx if self.before else dx.copy()

    def backward_weight(self, lease: Lease) -> None:
        """The weight gradients of all modules of f."""
        lease.slot.weights()

    def _ran(self, key: Key) -> None:
        if 0 not in key[0]:
            self.warm.add(key)


def _computed(module: Any) -> None:
    """Stands for ``module.backward_weight``, which a graph has run."""


class Lease:
    """A slot that is in use until nobody holds this."""

    def __init__(self, slot: Slot, free: list[Slot]) -> None:
        self.slot, self.free = slot, free

    def __del__(self) -> None:
        self.free.append(self.slot)


#: Graphs that read what another left for them, by that one.
_READERS = {"forward": ("backward", "backward without weights", "weights"), "backward without weights": ("weights",)}


class Slot:
    """One microbatch in flight through a block: its arrays and its graphs."""

    def __init__(self, block: Captured, key: Key, like: Array) -> None:
        self.inner, self.key, self.plans = block.inner, key, block.plans
        self.backend, self.shared = block.graphs.backend, block.graphs.dy
        self.parameters: list[Parameter] = list({id(p): p for _, _, p in block.inner.walk()}.values())
        self.x: Array = _empty(like)
        self.dy: Array | None = None  # of a backward whose weight gradients come later, and need it
        self.recordings: dict[str, Recording[Any]] = {}
        self.bound: dict[str, list[Array]] = {}  # what each was captured with

    def forward(self, x: Array) -> Array:
        """y, which lies in scratch memory."""
        self.backend.copy(self.x, x)
        y: Array = self._run("forward", self._forward)[0]
        return y

    def backward(self, dy: Array) -> tuple[Array, list[Any]]:
        """dx, which lies in scratch memory, and the modules whose weight gradients were added."""
        if self.key not in self.shared:
            self.shared[self.key] = _empty(self.x)
        self.backend.copy(self.shared[self.key], dy)
        dx, modules = self._run("backward", self._backward)
        return dx, modules

    def backward_without_weights(self, dy: Array) -> tuple[Array, list[Any]]:
        """dx, which lies in scratch memory, and the modules whose weight gradients ``weights`` will add."""
        if self.dy is None:
            self.dy = _empty(self.x)
        self.backend.copy(self.dy, dy)
        dx, items = self._run("backward without weights", self._backward_without_weights)
        return dx, [_module(fn) for fn, _ in items]

    def weights(self) -> None:
        """Add the weight gradients of the last ``backward_without_weights``."""
        self._run("weights", self._weights)

    def _run(self, what: str, work: Callable[[], Any]) -> Any:
        """Replay what ``work`` launches, captured before if need be; returns what it returned then."""
        arrays = [array for p in self.parameters for array in (p.data, p.grad)]
        if what not in self.recordings or not all(map(is_, self.bound[what], arrays)):
            for reader in _READERS.get(what, ()):
                self.recordings.pop(reader, None)
            made = record(self.backend, work, self.plans.get((self.key, what)))
            self.recordings[what], self.bound[what], self.plans[self.key, what] = made, arrays, made.kept
        found = self.recordings[what]
        found.graph.launch()
        return found.result

    def _forward(self) -> tuple[Array, Any]:
        y, saved = self.inner.forward(self.x)
        return self.backend.alias(y), saved

    def _backward(self) -> tuple[Array, list[Any]]:
        modules = []

        def at_once(fn: Callable[..., None], *args: Any) -> None:
            modules.append(_module(fn))
            fn(*args)

        dx = self.inner.backward(self.shared[self.key], self._saved(), at_once)
        return self.backend.alias(dx), modules

    def _backward_without_weights(self) -> tuple[Array, Any]:
        queue = Queue()
        dx = self.inner.backward(self.dy, self._saved(), queue)
        return self.backend.alias(dx), queue.items

    def _weights(self) -> None:
        for fn, args in self.recordings["backward without weights"].result[1]:
            fn(*_again(args))

    def _saved(self) -> Any:
        return _again(self.recordings["forward"].result[1])


def chain(stage: Sequential) -> None:
    """Let captured blocks that follow each other in ``stage`` hand their results on without a copy."""
    for a, b in pairwise(stage.layers.values()):
        if isinstance(a, Captured) and isinstance(b, Captured):
            a.after = b.before = True


def _again(tree: Any) -> Any:
    """Nested tuples, lists and dicts anew, with the same leaves: a backward takes what it is given apart."""
    if isinstance(tree, dict):
        return {key: _again(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        items = [_again(item) for item in tree]
        return items if isinstance(tree, list) else type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    return tree


def _module(fn: Callable[..., None]) -> Any:
    return getattr(fn, "__self__", None)


def _empty(like: Array) -> Array:
    return array_module(like).empty(like.shape, like.dtype)
