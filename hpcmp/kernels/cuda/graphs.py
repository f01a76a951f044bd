"""CUDA graphs: the launches of some work, captured once and replayed by one call of the host.

A graph reads and writes at the addresses of its capture. Of the arrays that the work makes, those that outlive it (what
a backward needs) have memory of their own as long as the recording lives; all others lie in scratch memory, which every
graph of a backend writes over. So graphs are replayed one after the other, and what one leaves in scratch memory is
read before the next. Which arrays outlive the work is not known before it is done: ``record`` captures it twice.

Work allocates through CuPy, asks the device for nothing and copies nothing to or from the host. What it launches by
``launch`` and by matrix products may read arrays that were there before; other calls only such as are held elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from ...arrays import Array
from ...errors import HpcmpError, InputError
from .choices import from_environment
from .launch import Arguments, witnessed
from .multiply import address, adds_biases

T = TypeVar("T")

_TRIES = 4  # captures until it is known what outlives the work: two, and one more where a library makes its workspace


class Graph(Protocol):
    """Captured work."""

    def launch(self) -> None:
        """Run it after what is queued on the current stream."""


class Backend(Protocol):
    """What captures, and replays."""

    def capture(self, run: Callable[[], T], memory: Memory) -> tuple[Graph, T]:
        """``run()`` captured and not executed, its arrays allocated by ``memory``; and its result."""

    def own(self, size: int) -> Any:
        """So many bytes of the memory that arrays have; an object with ``ptr``, which keeps them."""

    def scratch(self, size: int) -> Any:
        """So many bytes of scratch memory, likewise."""

    def copy(self, target: Array, x: Array) -> None:
        """``target[...] = x``, of one shape and dtype, ``target`` contiguous: as fast as it goes."""

    def alias(self, x: Array) -> Array:
        """``x`` where it lies, without keeping its memory."""


class Memory:
    """The allocations of one capture, numbered in their order. ``kept``: the numbers of those that last; None: which
    these are is not known yet, and the capture will be thrown away."""

    def __init__(self, backend: Backend, kept: frozenset[int] | None) -> None:
        self.backend, self.kept, self.count = backend, kept, 0
        self.live: dict[int, tuple[int, int, Any]] = {}  # by address: the number, the size, what keeps the memory
        self.seen: dict[int, Array] = {}  # arrays of others that launches read or write

    def malloc(self, size: int) -> int:
        """The address of ``size`` bytes, more than none."""
        number, self.count = self.count, self.count + 1
        own = self.kept is None or number in self.kept
        memory = self.backend.own(size) if own else self.backend.scratch(size)
        self.live[memory.ptr] = number, size, memory
        return int(memory.ptr)

    def free(self, at: int) -> None:
        """Nobody uses the memory at this address any more."""
        self.live.pop(at, None)

    def see(self, args: Arguments) -> None:
        """Hold the arrays among a launch's arguments that are not of this capture, such as tables of angles."""
        for x in args:
            if x is None or isinstance(x, int | float | np.generic) or x.dtype.names:
                continue
            at = address(x)
            if not any(start <= at < start + size for start, (_, size, _) in self.live.items()):
                self.seen[id(x)] = x

    def alive(self) -> frozenset[int]:
        """The numbers of the allocations that are in use."""
        return frozenset(number for number, _, _ in self.live.values())


@dataclass
class Recording(Generic[T]):
    """A graph, and what must stay where it is for it: what the work returned, and arrays that were there before."""

    graph: Graph
    result: T
    kept: frozenset[int]
    seen: list[Array]


def record(
    backend: Backend,
    run: Callable[[], T],
    kept: frozenset[int] | None = None,
    agreed: Callable[[bool], bool] = bool,
) -> Recording[T]:
    """``run`` captured; it is called several times, must do the same each time, and is not executed.

    kept: a former recording's of like work, for a capture less. agreed: whether what is true here is so on all ranks
    that communicate in the work and capture it together, each as often as the others. What ``run`` returns keeps its
    arrays: an ``alias`` of one is good until the next graph is launched.
    """
    for _ in range(_TRIES):
        memory = Memory(backend, kept)
        with witnessed(memory.see):
            graph, result = backend.capture(run, memory)
        alive = memory.alive()
        if agreed(alive == kept):
            return Recording(graph, result, alive, list(memory.seen.values()))
        del graph, result
        kept = alive
    raise RuntimeError("the work to be captured allocates something else each time")


class Cupy:
    """On a GPU, through CuPy. Work is captured on a stream of its own, on which nothing ever runs, since CUDA cannot
    capture the default one, and replayed on the current stream: nothing needs to wait for anything. Never run on a GPU.
    """

    def __init__(self) -> None:
        import cupy

        if not adds_biases():
            raise InputError(
                'train.cuda_graphs = true needs nvmath-python (pip install "hpcmp[cuda12]", or cuda13): CuPy refuses '
                "cuBLAS while it captures"
            )
        if from_environment().tune is not None:
            raise InputError("train.cuda_graphs = true: with HPCMP_GEMM_TUNE products are timed, which is not captured")
        # NCCL registers what captured operations read and write, and may then take other algorithms, with other bits
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
        self.cupy, self.cuda = cupy, cupy.cuda
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.outside = _Outside()
        self.pool = cupy.cuda.MemoryPool(_Kept(self.outside))

    def capture(self, run: Callable[[], T], memory: Memory) -> tuple[Graph, T]:
        """See ``Backend``."""
        self.outside.stream, self.outside.allocate = self.cuda.get_current_stream(), self.cuda.get_allocator()
        with self.cuda.using_allocator(partial(self._allocate, memory)), self.stream:
            self.stream.begin_capture()
            try:
                result = run()
            except BaseException as error:
                with suppress(RuntimeError):  # it ends the capture, whatever has become of that
                    self.stream.end_capture()
                if isinstance(error, NotImplementedError | RuntimeError):
                    raise HpcmpError(f"train.cuda_graphs = true: not to be captured: {error}; set it false") from error
                raise
            graph: Graph = self.stream.end_capture()
        return graph, result

    def _allocate(self, memory: Memory, size: int) -> Any:
        at = memory.malloc(size) if size else 0
        held = self.cuda.UnownedMemory(at, size, _Held(memory, at), self.cuda.Device().id)
        return self.cuda.MemoryPointer(held, 0)

    def own(self, size: int) -> Any:
        """See ``Backend``."""
        return self.outside(size)

    def scratch(self, size: int) -> Any:
        """See ``Backend``."""
        return self.pool.malloc(size)

    def copy(self, target: Array, x: Array) -> None:
        """See ``Backend``."""
        if x.flags.c_contiguous:
            target.data.copy_from_device_async(x.data, x.nbytes)
        else:
            target[...] = x

    def alias(self, x: Array) -> Array:
        """See ``Backend``."""
        memory = self.cuda.UnownedMemory(x.data.ptr, x.nbytes, None, x.data.device_id)
        return self.cupy.ndarray(x.shape, x.dtype, self.cuda.MemoryPointer(memory, 0), x.strides)


class _Held:
    """An address that a capture's ``memory`` gets back when nobody holds this. CuPy's PythonFunctionAllocator would
    call what Python's garbage collector may have taken apart before."""

    def __init__(self, memory: Memory, at: int) -> None:
        self.memory, self.at = memory, at

    def __del__(self) -> None:
        self.memory.free(self.at)


class _Outside:
    """Allocates as callers of ``capture`` do: what was freed on the stream there, where graphs run, is used again."""

    stream: Any = None
    allocate: Any = None

    def __call__(self, size: int) -> Any:
        with self.stream:
            return self.allocate(size)


class _Kept:
    """Allocates likewise, and never lets go: a pool that finds no more memory gives up what is free in it, and graphs
    would go on writing there."""

    def __init__(self, allocate: Callable[[int], Any]) -> None:
        self.allocate = allocate
        self.made: list[Any] = []

    def __call__(self, size: int) -> Any:
        self.made.append(self.allocate(size))
        return self.made[-1]
