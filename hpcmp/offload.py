"""Offload: what a forward saves, and what an optimizer keeps, waits in the host's memory.

    handle = host.put(x)         # begins to copy x there; the device's memory is free once that is done
    x = handle.fetch().wait()    # begins to bring x back, and waits: fetch early, wait late
    handle.store(x)              # begins to copy new values there

On a GPU the copies run on streams of their own, to and from pinned memory, under the computation. On the CPU the host's
memory is where arrays lie: nothing is copied, and all else happens as on a GPU. Rhu et al., "vDNN", 2016 (activations);
Ren et al., "ZeRO-Offload", 2021 (optimizer states).
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from .arrays import Array
from .comm.base import Pending
from .module import Module, Parameter
from .wgrad import WGrad


class Copies:
    """How arrays get to the host's memory and back: here, they are there already."""

    #: The fewest bytes that are worth a copy.
    smallest = 0

    def away(self, x: Array, out: Array | None = None) -> Pending:
        """Begin to copy ``x`` to the host, over ``out`` if given; the result is the host's array."""
        if out is None or out is x:
            return Pending(x)
        out[...] = x
        return Pending(out)

    def back(self, x: Array) -> Pending:
        """Begin to copy the host's array ``x`` to the device; the result is the device's array."""
        return Pending(x)

    def finish(self) -> None:
        """Wait until everything that was sent away is there."""

    def read(self, x: Array) -> Callable[[], Array]:
        """Begin to copy ``x`` to the host; the function waits for the copy, and for what was queued before it, and
        returns the host's array."""
        return lambda: x


class CudaCopies(Copies):
    """A stream for each direction. A copy starts after the work queued so far, and ``wait`` makes what is queued from
    then on run after it; neither blocks the host. Never run on a GPU.

    The host's arrays are held until their copies are over: CuPy's pool of pinned memory hands out at once what is let
    go of, to be written by the host while the GPU still reads or writes it.
    """

    smallest = 1 << 16

    def __init__(self, xp: ModuleType) -> None:
        self.xp = xp
        self.leaving, self.coming = (xp.cuda.Stream(non_blocking=True) for _ in range(2))
        self._held: deque[tuple[Any, Array]] = deque()  # with the events of the ends of their copies

    def away(self, x: Array, out: Array | None = None) -> Pending:
        import cupyx  # ships with CuPy

        x = self.xp.ascontiguousarray(x)
        host = cupyx.empty_pinned(x.shape, x.dtype) if out is None else out
        return self._queue(self.leaving, lambda s: x.get(stream=s, out=host, blocking=False), host, host, x)

    def back(self, x: Array) -> Pending:
        device = self.xp.empty(x.shape, x.dtype)
        return self._queue(self.coming, lambda s: device.set(x, stream=s), x, device, x)

    def finish(self) -> None:
        self.leaving.synchronize()

    def read(self, x: Array) -> Callable[[], Array]:
        import cupyx  # ships with CuPy

        stream, done = self.xp.cuda.get_current_stream(), self.xp.cuda.Event(disable_timing=True)
        host = cupyx.empty_pinned(x.shape, x.dtype)
        x.get(stream=stream, out=host, blocking=False)
        done.record(stream)
        self._hold(host, done)

        def wait() -> Array:
            done.synchronize()
            return host

        return wait

    def _queue(self, stream: Any, copy: Callable[[Any], Any], host: Array, result: Array, source: Array) -> Pending:
        ready, done = (self.xp.cuda.Event(disable_timing=True) for _ in range(2))
        ready.record(self.xp.cuda.get_current_stream())
        stream.wait_event(ready)
        copy(stream)
        done.record(stream)
        self._hold(host, done)
        return Pending(result, [_Done(self.xp, done)], None, source)

    def _hold(self, host: Array, done: Any) -> None:
        self._held.append((done, host))
        while self._held and self._held[0][0].done:
            self._held.popleft()


class _Done:
    """The end of a copy, under the names of an MPI request."""

    def __init__(self, xp: ModuleType, event: Any) -> None:
        self.xp, self.event = xp, event

    def Wait(self) -> None:
        self.xp.cuda.get_current_stream().wait_event(self.event)

    def Test(self) -> bool:
        return bool(self.event.done)


class Handle:
    """An array that waits in the host's memory. Until ``settle`` or another method, it must not be written."""

    def __init__(self, copies: Copies, x: Array) -> None:
        self.copies = copies
        self._leaving, self._coming = copies.away(x), None  # type: Pending, Pending | None

    def settle(self) -> None:
        """Let go of the device's array: its memory is free to what is queued from now on, after the copy."""
        self._leaving.wait()

    def fetch(self) -> Pending:
        """Begin to bring the array back, unless that has begun; the result is the device's array."""
        if self._coming is None:
            self._coming = self.copies.back(self._leaving.wait())
        return self._coming

    def store(self, x: Array) -> None:
        """Begin to copy ``x``, of the same shape and dtype, in place of what is there; forget what was fetched."""
        self._leaving, self._coming = self.copies.away(x, self._leaving.wait()), None

    def host(self) -> Array:
        """The host's array, complete. What is written to it is fetched from now on."""
        array, self._coming = self._leaving.wait(), None
        self.copies.finish()
        return array


class Host:
    """The host's memory beside the device of the arrays of ``xp``; ``copies``: how arrays get there and back."""

    def __init__(self, xp: ModuleType = np, copies: Copies | None = None) -> None:
        self.xp = xp
        self.copies = copies or (Copies() if xp is np else CudaCopies(xp))
        self.last: Callable[[], Saved | None] = lambda: None  # what was saved last, if that is still of use

    def put(self, x: Array) -> Handle:
        """Begin to copy ``x`` here."""
        return Handle(self.copies, x)

    def save(self, tree: Any) -> Saved:
        """Begin to copy the arrays in nested tuples, lists and dicts that are worth it, and let go of those of the
        call before: so that two blocks' activations are on the device at once, one of them on its way."""
        before = self.last()
        if before is not None:
            for handle in before.handles:
                handle.settle()
        saved = Saved(self, tree)
        self.last = weakref.ref(saved)
        return saved


class Saved:
    """What a block saved, its arrays on the host. It knows what was saved before it, which is needed after it."""

    def __init__(self, host: Host, tree: Any) -> None:
        put: dict[int, Handle] = {}

        def away(x: Array) -> Any:
            if x.nbytes < host.copies.smallest:
                return x
            if id(x) not in put:
                put[id(x)] = host.put(x)
            return put[id(x)]

        self.before = host.last
        self.tree = _mapped(tree, host.xp.ndarray, away)
        self.handles = list(put.values())

    def start(self) -> None:
        """Begin to bring everything back."""
        for handle in self.handles:
            handle.fetch()

    def take(self) -> Any:
        """What was saved, on the device; and begin to bring back what is needed next."""
        self.start()
        tree = _mapped(self.tree, Handle, lambda handle: handle.fetch().wait())
        self.tree, self.handles = None, []  # the device's arrays now live as long as they are used
        following = self.before()
        if following is not None:
            following.start()
        return tree


class Offload(Module):
    """f, whose ``saved`` waits in the host's memory between forward and backward.

    ``host`` is shared by the blocks of a model. The backward of a block brings back, under its own work, what the block
    saved that ran before it. What lies in objects other than tuples, lists and dicts (a traced tape) stays where it is.
    """

    def __init__(self, inner: Module, host: Host) -> None:
        self.inner, self.memory = inner, host

    def members(self) -> Iterator[tuple[str, Parameter | Module]]:
        yield "", self.inner  # offloading changes no parameter's name

    def forward(self, x: Any) -> tuple[Any, Saved]:
        y, saved = self.inner.forward(x)
        return y, self.memory.save(saved)

    def backward(self, dy: Any, saved: Saved, wgrad: WGrad) -> Any:
        return self.inner.backward(dy, saved.take(), wgrad)


def _mapped(tree: Any, kind: type, fn: Callable[[Any], Any]) -> Any:
    """``tree`` with fn(leaf) for each leaf that is a ``kind``."""
    if isinstance(tree, kind):
        return fn(tree)
    if isinstance(tree, dict):
        return {key: _mapped(value, kind, fn) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        items = [_mapped(item, kind, fn) for item in tree]
        return items if isinstance(tree, list) else type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    return tree
