"""Blocks whose launches are captured in CUDA graphs and replayed: a microbatch's forward and backward are a call each.

A graph is of one input's shape, and reads and writes at addresses of its own. So a block has, for each shape, as many
slots as microbatches are in flight: from a forward to the end of its backward or, in schedules that put them off, of
its weight gradients. Arrays that blocks hand to each other are copied once; so is what differs between microbatches
beside their numbers (``Cursor.arrays``), into the slot, whose graphs read it from the forward to the backward. What
blocks communicate by NCCL is part of their graphs (``comm.replay``): ranks that do so capture and replay together.

docs/gpu.md says what that costs and what cannot be captured. ``kernels.cuda.graphs`` captures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from operator import is_
from types import MethodType
from typing import Any

import numpy as np

from .arrays import Array, array_module
from .comm.base import Communicator, Solo
from .comm.replay import Replay
from .cursor import Cursor, Place
from .errors import InputError
from .kernels.cuda.graphs import Backend, Cupy, Recording, record
from .module import Module, Parameter, Sequential
from .wgrad import Queue, WGrad

#: An input's shape and dtype, the whole sequence's length, and the names and shapes of the arrays of its place.
Key = tuple[tuple[int, ...], Any, int, tuple[Any, ...]]


class Graphs:
    """What the captured blocks of a rank share: the cursor of their layers, what captures (on a GPU, unless given) and,
    by shape, where a backward finds dy, which is of no use after it.

    comm: the ranks that communicate within their blocks. Raises InputError where they do so over MPI.
    """

    def __init__(self, cursor: Cursor, comm: Communicator | None = None, backend: Backend | None = None) -> None:
        self.cursor, self.comm, self.backend = cursor, comm or Solo(), backend or Cupy()
        self.dy: dict[Key, Array] = {}
        if not self.comm.captures:
            raise InputError(
                "train.cuda_graphs = true: the layout's blocks communicate, here over MPI, which no graph can hold; "
                'NCCL would fit (communication.backend = "auto", and a GPU for each rank)'
            )

    def agreed(self, here: bool) -> bool:
        """Whether it is true on all ranks of ``comm``."""
        return not self.comm.all_reduce(np.array([not here], np.int64), "max").wait()[0]


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
        self.warm: dict[Key, bool] = {}  # whether it has run; False: it is never captured
        self.free: dict[Key, list[Slot]] = {}
        self.plans: dict[tuple[Key, str], frozenset[int]] = {}

    def members(self) -> Any:
        yield "", self.inner  # capturing changes no parameter's name

    def forward(self, x: Array) -> tuple[Array, Any]:
        place = self.graphs.cursor.place
        arrays = self.graphs.cursor.arrays(place, array_module(x))
        key = x.shape, x.dtype, place.length, tuple((name, array.shape) for name, array in arrays.items())
        if not self.warm.get(key):
            y, saved = self.inner.forward(x.copy() if self.before else x)
            return y, (key, saved)
        free = self.free.setdefault(key, [])
        slot = free.pop() if free else Slot(self, key, x, place)
        lease = Lease(slot, free)
        y = slot.forward(x, arrays)
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
        if key not in self.warm:
            self.warm[key] = self.graphs.agreed(0 not in key[0])


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

    def __init__(self, block: Captured, key: Key, like: Array, place: Place) -> None:
        self.inner, self.key, self.plans = block.inner, key, block.plans
        self.graphs, self.backend, self.shared = block.graphs, block.graphs.backend, block.graphs.dy
        self.place = dataclasses.replace(place)  # at which the layers are captured: its arrays are those of the slot
        self.place.arrays.update({name: _empty(array) for name, array in place.arrays.items()})
        self.parameters: list[Parameter] = list({id(p): p for _, _, p in block.inner.walk()}.values())
        self.x: Array = _empty(like)
        self.dy: Array | None = None  # of a backward whose weight gradients come later, and need it
        self.recordings: dict[str, Recording[Any]] = {}
        self.bound: dict[str, list[Array]] = {}  # what each was captured with

    def forward(self, x: Array, arrays: dict[str, Array]) -> Array:
        """y, which lies in scratch memory. arrays: of the microbatch's place."""
        self.backend.copy(self.x, x)
        for name, array in arrays.items():
            self.backend.copy(self.place.arrays[name], array)
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
            made = self._record(work, self.plans.get((self.key, what)))
            self.recordings[what], self.bound[what], self.plans[self.key, what] = made, arrays, made.kept
        found = self.recordings[what]
        found.graph.launch()
        return found.result

    def _record(self, work: Callable[[], Any], kept: frozenset[int] | None) -> Recording[Any]:
        """``work`` captured, at the place of this slot."""
        cursor, replay = self.graphs.cursor, Replay()
        place, cursor.place = cursor.place, self.place

        def run() -> Any:
            with replay.noting():
                return work()

        try:
            made = record(self.backend, run, kept, self.graphs.agreed)
        finally:
            cursor.place = place
        made.graph = replay.of(made.graph)
        return made

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
