"""Communicator: the collectives, documented once, and Pending, an array that one of them is still writing.

Every call starts at once, does not block, and returns a ``Pending``; ``wait()`` yields the array. Calls on one
communicator are matched by their order, which must be the same on every rank. An array that was passed in must not be
written before ``wait()`` returns, and a result may share memory with it: treat both as read-only.

Shards follow ``hpcmp.partition``: contiguous and as even as can be. A call that assembles shards takes the ``total``
of the axis, since a rank cannot tell it from its own shard alone; without it the shards are equal. ``traffic`` counts
what this rank sends.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

from .. import partition
from ..arrays import Array
from .recorder import Record
from .traffic import Traffic

Op = Literal["sum", "max"]

#: What moves on operations of several messages, which MPI does not know as one: every wait of the process calls it.
DRIVERS: list[Callable[[], None]] = []


class Waited:
    """``seconds``: how long this process has waited for communication so far."""

    seconds = 0.0


class Timed:
    """``kept``: while there is a profile on a GPU, the operations that it runs, each with its record."""

    kept: list[tuple[Record, Any]] | None = None


#: Of communications that were given up while they ran (an exception between start and wait): MPI reads and writes their
#: buffers when the other ranks come to it, so that no other array may ever get that memory.
ABANDONED: list[tuple[Any, ...]] = []


class Pending:
    """The result of a communication that may still be running. It keeps alive every buffer that is in use, also of a
    communication that nobody waits for any more."""

    record: Record | None = None  # of the operation, until it is there

    def __init__(self, result: Array, requests: Any = (), finish: Callable[[Array], Array] | None = None, *keep: Any):
        self.result, self.requests, self.finish, self.keep = result, list(requests), finish, keep

    def wait(self) -> Array:
        """Block until it is there; returns the array. Later calls return the same array."""
        record, self.record = self.record, None
        if record is None:
            return self._complete()
        record.block()
        done = False
        try:
            self._complete()
            done = True
        finally:
            record.leave(done)
        return self.result

    def _complete(self) -> Array:
        before, start = Waited.seconds, time.perf_counter()
        for request in self.requests:
            tries = 0
            while DRIVERS and not request.Test():
                for drive in tuple(DRIVERS):
                    drive()
                give_way(tries := tries + 1)
            request.Wait()
        if self.requests:  # set, not added to: waits within this one are part of it
            Waited.seconds = before + time.perf_counter() - start
        if self.finish is not None:
            self.result = self.finish(self.result)
        self.requests, self.finish, self.keep = [], None, ()
        return self.result

    def test(self) -> bool:
        """Whether it is there; gives the library a chance to make progress."""
        self.requests = [request for request in self.requests if not request.Test()]
        if self.record is not None and not self.requests:
            self.record.finish()
            self.record = None
        return not self.requests

    def __del__(self) -> None:
        if self.requests:
            ABANDONED.append((self.requests, self.result, self.keep))


def give_way(tries: int) -> None:
    """Between two looks at what is not there: let another process have the core, and sleep after a few milliseconds in
    which that was for nothing."""
    if tries < 1000:
        os.sched_yield()
    else:
        time.sleep(5e-5)


class Communicator(ABC):
    """Moves arrays between the ``size`` ranks of a group, of which this one is ``rank``."""

    rank: int
    size: int
    #: Whether CUDA graphs can hold its collectives, of arrays on a GPU.
    captures = False

    @cached_property
    def traffic(self) -> Traffic:
        """What this rank has sent so far."""
        return Traffic()

    @abstractmethod
    def all_reduce(self, x: Array, op: Op = "sum", out: Array | None = None) -> Pending:
        """y = sum_r x_r (or the maximum), on every rank. Same shape everywhere. ``out`` may be ``x``: in place."""

    @abstractmethod
    def all_gather(self, x: Array, axis: int = 0, total: int | None = None) -> Pending:
        """y = [x_0, x_1, ...] along ``axis``, on every rank."""

    @abstractmethod
    def reduce_scatter(self, x: Array, axis: int = 0) -> Pending:
        """y = this rank's part, along ``axis``, of sum_r x_r. The adjoint of ``all_gather``."""

    @abstractmethod
    def all_to_all(self, x: Array, split: int, concat: int, total: int | None = None) -> Pending:
        """Part r of ``x`` along ``split`` goes to rank r; what comes is joined along ``concat``, ``total`` long."""

    @abstractmethod
    def all_gather_v(self, x: Array, rows: Sequence[int]) -> Pending:
        """``all_gather`` along axis 0 of shards of any sizes: rank r passes ``rows[r]`` rows."""

    @abstractmethod
    def reduce_scatter_v(self, x: Array, rows: Sequence[int]) -> Pending:
        """The adjoint of ``all_gather_v``: rank r gets ``rows[r]`` rows of the sum, ``sum(rows)`` long."""

    @abstractmethod
    def all_to_all_v(self, x: Array, sent: Sequence[int], received: Sequence[int]) -> Pending:
        """``sent[r]`` rows of ``x`` (axis 0, in the order of ranks) go to rank r; ``received[r]`` come from it."""

    @abstractmethod
    def broadcast(self, x: Array, root: int = 0) -> Pending:
        """y = x of ``root``, on every rank; every rank passes an array of the same shape and dtype."""

    @abstractmethod
    def send(self, x: Array, peer: int, tag: int = 0) -> Pending:
        """To ``peer``, which must call ``recv`` with the same tag.

        Where arrays lie on GPUs, all messages of even tags from one rank to another are received in the order in which
        they are sent, and all of odd tags (NCCL has no tags).
        """

    @abstractmethod
    def recv(self, shape: tuple[int, ...], dtype: Any, peer: int, tag: int = 0, *, like: Array) -> Pending:
        """From ``peer``, into a new array of the kind (NumPy or CuPy) of ``like``."""

    def shards(self, n: int | None, local: int) -> list[int]:
        """Every rank's share of an axis of ``n`` (of ``size`` equal shares of ``local``, if ``n`` is None)."""
        return [local] * self.size if n is None else partition.sizes(n, self.size)

    def part(self, n: int) -> slice:
        """This rank's share of an axis of length ``n``."""
        return partition.part(n, self.size, self.rank)

    def close(self) -> None:  # noqa: B027 (most have nothing to free)
        """Free what the communicator holds; collective."""


class Solo(Communicator):
    """A group of one: every collective is the identity. Needs no MPI; a serial run is a mesh of these."""

    rank, size, captures = 0, 1, True

    def all_reduce(self, x: Array, op: Op = "sum", out: Array | None = None) -> Pending:
        if out is not None and out is not x:
            out[...] = x
        return Pending(x if out is None else out)

    def all_gather(self, x: Array, axis: int = 0, total: int | None = None) -> Pending:
        return Pending(x)

    def reduce_scatter(self, x: Array, axis: int = 0) -> Pending:
        return Pending(x)

    def all_to_all(self, x: Array, split: int, concat: int, total: int | None = None) -> Pending:
        return Pending(x)

    def all_gather_v(self, x: Array, rows: Sequence[int]) -> Pending:
        return Pending(x)

    def reduce_scatter_v(self, x: Array, rows: Sequence[int]) -> Pending:
        return Pending(x)

    def all_to_all_v(self, x: Array, sent: Sequence[int], received: Sequence[int]) -> Pending:
        return Pending(x)

    def broadcast(self, x: Array, root: int = 0) -> Pending:
        return Pending(x)

    def send(self, x: Array, peer: int, tag: int = 0) -> Pending:
        raise ValueError("a group of one has nobody to send to")

    def recv(self, shape: tuple[int, ...], dtype: Any, peer: int, tag: int = 0, *, like: Array) -> Pending:
        raise ValueError("a group of one has nobody to receive from")
