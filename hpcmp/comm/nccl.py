"""Communicator over NCCL for arrays on a GPU; arrays on the host go over MPI.

Nothing here waits on the host. A call starts once the work queued so far on the current stream is done, on a stream of
its own, and ``wait()`` makes the stream that is then current wait for it; until then ``Pending`` keeps the buffers, so
that CuPy's pool, which hands freed memory out again in the order of one stream, cannot reuse them too early.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ..arrays import Array, array_module
from .base import Op, Pending, Timed
from .lanes import Call, Done, Lane, Library
from .layouts import Layouts
from .mpi import MpiCommunicator

if TYPE_CHECKING:
    from mpi4py import MPI

LaneName = tuple[str, int]

_COLLECTIVES: LaneName = ("collectives", 0)


class NcclCommunicator(Layouts):
    """The collectives over NCCL, for the ranks of ``control``, each with a GPU of its own that is its current device.

    ``control`` serves arrays on the host; it belongs to this communicator from now on: ``close`` frees it.

    NCCL has no tags: messages from one rank to another are matched by their order. A message holds its lane until both
    sides have come to it, as a synchronous send does. So there are several: a message takes the lane of its direction
    (to a higher or to a lower rank), of its sender's parity and of its tag's. In a pipeline, what comes from either
    neighbour and what goes to it, activations and gradients apart, then take different lanes, and none waits for
    another. Between two ranks, messages of even tags, and those of odd tags, must be received in the order in which
    they are sent.

    Lanes are made when they are first needed, while every rank waits for the others: that of the collectives at the
    first collective, those of the messages at the first ``send`` or ``recv``, to which every rank of the group must
    therefore come. Nothing is called for arrays without elements.
    """

    captures = True

    def __init__(self, control: MpiCommunicator, library: Library | None = None) -> None:
        self.control, self.rank, self.size = control, control.rank, control.size
        self.library = library or Library()
        self._lanes: dict[LaneName, Lane] = {}

    def _all_reduce(self, x: Array, op: Op, out: Array | None) -> Pending:
        if not self.library.on_device(x):
            return self.control._all_reduce(x, op, out)
        lane, xp = self._lane(_COLLECTIVES), array_module(x)
        send = xp.ascontiguousarray(x)
        recv = x if out is x and send is x else xp.empty(x.shape, x.dtype)
        call = partial(lane.nccl.allReduce, self._at(send), self._at(recv), x.size, self._type(x), self._op(op))
        pending = lane.start([(x.size, call)], recv, send)
        if out is not None and out is not recv:
            pending.finish = partial(_fill, out)
        return pending

    def _broadcast(self, x: Array, root: int) -> Pending:
        if not self.library.on_device(x):
            return self.control._broadcast(x, root)
        lane, xp = self._lane(_COLLECTIVES), array_module(x)
        send = xp.ascontiguousarray(x)
        recv = send.reshape(x.shape) if self.rank == root else xp.empty(x.shape, x.dtype)
        call = partial(lane.nccl.broadcast, self._at(send), self._at(recv), x.size, self._type(x), root)
        return lane.start([(x.size, call)], recv, send)

    def _send(self, x: Array, peer: int, tag: int) -> Pending:
        if not self.library.on_device(x):
            return self.control._send(x, peer, tag)
        lane = self._lane(message_lane(self.rank, peer, tag))
        buffer = array_module(x).ascontiguousarray(x)
        call = partial(lane.nccl.send, self._at(buffer), x.size, self._type(x), peer)
        return lane.start([(x.size, call)], x, buffer)

    def _recv(self, shape: tuple[int, ...], dtype: Any, peer: int, tag: int, like: Array) -> Pending:
        if not self.library.on_device(like):
            return self.control._recv(shape, dtype, peer, tag, like)
        lane = self._lane(message_lane(peer, self.rank, tag))
        buffer = array_module(like).empty(shape, dtype)
        call = partial(lane.nccl.recv, self._at(buffer), buffer.size, self._type(buffer), peer)
        return lane.start([(buffer.size, call)], buffer)

    def duplicate(self) -> MPI.Intracomm:
        return self.control.duplicate()

    def _start(self, *call: Any) -> Pending:
        return _watched(super()._start(*call))

    def _message(self, *call: Any) -> Pending:
        return _watched(super()._message(*call))

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()
        self.control.close()

    def _all_gather(self, x: Array, counts: list[int]) -> Pending:
        if not self.library.on_device(x):
            return self.control._all_gather(x, counts)
        lane, kind = self._lane(_COLLECTIVES), self._type(x)
        recv = array_module(x).empty(sum(counts), x.dtype)
        if len(set(counts)) == 1:
            whole = partial(lane.nccl.allGather, self._at(x), self._at(recv), counts[0], kind)
            return lane.start([(counts[0], whole)], recv, x)
        calls: list[Call] = [
            (n, partial(lane.nccl.broadcast, self._at(x), self._at(recv, start), n, kind, rank))
            for rank, n, start in shards(counts)
        ]
        return lane.start(calls, recv, x)

    def _reduce_scatter(self, x: Array, counts: list[int]) -> Pending:
        if not self.library.on_device(x):
            return self.control._reduce_scatter(x, counts)
        lane, kind, op = self._lane(_COLLECTIVES), self._type(x), self._op("sum")
        recv = array_module(x).empty(counts[self.rank], x.dtype)
        if len(set(counts)) == 1:
            whole = partial(lane.nccl.reduceScatter, self._at(x), self._at(recv), counts[0], kind, op)
            return lane.start([(counts[0], whole)], recv, x)
        calls: list[Call] = [
            (n, partial(lane.nccl.reduce, self._at(x, start), self._at(recv), n, kind, op, rank))
            for rank, n, start in shards(counts)
        ]
        return lane.start(calls, recv, x)

    def _all_to_all(self, x: Array, sent: list[int], received: list[int]) -> Pending:
        if not self.library.on_device(x):
            return self.control._all_to_all(x, sent, received)
        lane, kind = self._lane(_COLLECTIVES), self._type(x)
        recv = array_module(x).empty(sum(received), x.dtype)
        calls: list[Call] = [
            (n, partial(lane.nccl.send, self._at(x, start), n, kind, rank)) for rank, n, start in shards(sent)
        ]
        calls += [
            (n, partial(lane.nccl.recv, self._at(recv, start), n, kind, rank)) for rank, n, start in shards(received)
        ]
        return lane.start(calls, recv, x)

    def _lane(self, name: LaneName) -> Lane:
        if name not in self._lanes:
            with self._blocked():
                for made in [name] if name == _COLLECTIVES else message_lanes(self.size):
                    self._lanes[made] = Lane(self.library, self.control, f"{self._axes()}, {made[0]}")
        return self._lanes[name]

    @contextmanager
    def _blocked(self) -> Iterator[None]:
        """The process waits for the other ranks in the operation at hand: the watchdog is to know."""
        record = self.flight.last if self.flight else None
        if record is None:
            yield
            return
        record.block()
        try:
            yield
        finally:
            record.unblock()

    def _axes(self) -> str:
        return (self.flight.axes if self.flight else "") or "a group"

    def _at(self, x: Array, element: int = 0) -> int:
        return self.library.pointer(x) + element * int(x.dtype.itemsize)

    def _type(self, x: Array) -> int:
        kind: int | None = getattr(self.library.nccl, f"NCCL_{x.dtype.name.upper()}", None)
        if kind is None:
            raise TypeError(f"NCCL moves no arrays of {x.dtype}")
        return kind

    def _op(self, op: Op) -> int:
        return int(getattr(self.library.nccl, f"NCCL_{op.upper()}"))


def message_lane(source: int, target: int, tag: int) -> LaneName:
    """The lane of messages from ``source`` to ``target``: by direction, the sender's parity and the tag's."""
    return ("up" if target > source else "down", 2 * (tag % 2) + source % 2)


def message_lanes(size: int) -> list[LaneName]:
    """All lanes that messages between ``size`` ranks take, in the order in which every rank makes them."""
    ranks = range(size)
    pairs = [(source, target) for source in ranks for target in ranks if source != target]
    return sorted({message_lane(*pair, tag) for pair in pairs for tag in (0, 1)})


def shards(counts: list[int]) -> list[tuple[int, int, int]]:
    """(rank, count, offset) of every rank's shard, one after the other in a flat array."""
    return list(zip(range(len(counts)), counts, accumulate(counts, initial=0), strict=False))


def _watched(pending: Pending) -> Pending:
    """``pending``, whose record goes by its event: ``wait`` returns before it is there."""
    if pending.record is not None and pending.requests and isinstance(pending.requests[0], Done):
        pending.record.event = done = pending.requests[0]
        if Timed.kept is not None and done.began is not None:
            Timed.kept.append((pending.record, done))
    return pending


def _fill(target: Array, y: Array) -> Array:
    target[...] = y
    return target
