"""Layouts: collectives along any axis as ones over flat buffers; here every operation is counted and recorded."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from .. import partition
from ..arrays import Array, array_module
from .base import Communicator, Op, Pending
from .recorder import Flight, Record, Site, called_at
from .replay import noting
from .traffic import all_reduced

if TYPE_CHECKING:
    from mpi4py import MPI

    from .check import Check


class Layouts(Communicator):
    """The part that MPI and NCCL share: turning a collective along any axis into one over flat, contiguous buffers.

    Subclasses move ``counts[r]`` elements per rank between one-dimensional buffers; this class counts the traffic,
    moves the axis to the front, cuts, joins and moves it back. An axis that is already first costs no copy.

    check: compares every collective between the ranks before it starts (``check.py``); None: nobody does.
    """

    check: Check | None = None

    @cached_property
    def flight(self) -> Flight | None:
        """Where this rank's operations are recorded; None: nowhere, since they are part of others that are."""
        return Flight("", range(self.size))

    def all_reduce(self, x: Array, op: Op = "sum", out: Array | None = None) -> Pending:
        self.traffic.count("all_reduce", all_reduced(x.size, self.size, self.rank) * self._summed(x))
        return self._start(_REDUCTIONS[op], x, x.size, None, None, self._all_reduce, x, op, out)

    def broadcast(self, x: Array, root: int = 0) -> Pending:
        self.traffic.count("broadcast", x.nbytes if (self.rank + 1 - root) % self.size else 0)
        return self._start("broadcast", x, x.size, root, None, self._broadcast, x, root)

    def send(self, x: Array, peer: int, tag: int = 0) -> Pending:
        self.traffic.count("send", x.nbytes)
        return self._message("send", x.dtype, x.size, peer, tag, self._send, x, peer, tag)

    def recv(self, shape: tuple[int, ...], dtype: Any, peer: int, tag: int = 0, *, like: Array) -> Pending:
        count = math.prod(shape)
        return self._message("recv", dtype, count, peer, tag, self._recv, shape, dtype, peer, tag, like)

    def all_gather(self, x: Array, axis: int = 0, total: int | None = None) -> Pending:
        rows = self.shards(total, x.shape[axis])
        if axis == 0:
            return self.all_gather_v(x, rows)
        xp = array_module(x)
        pending = self.all_gather_v(xp.moveaxis(x, axis, 0), rows)
        return _then(pending, lambda y: xp.moveaxis(y, 0, axis))

    def reduce_scatter(self, x: Array, axis: int = 0) -> Pending:
        rows = partition.sizes(x.shape[axis], self.size)
        if axis == 0:
            return self.reduce_scatter_v(x, rows)
        xp = array_module(x)
        pending = self.reduce_scatter_v(xp.moveaxis(x, axis, 0), rows)
        return _then(pending, lambda y: xp.moveaxis(y, 0, axis))

    def all_to_all(self, x: Array, split: int, concat: int, total: int | None = None) -> Pending:
        xp = array_module(x)
        out_rows, in_rows = partition.sizes(x.shape[split], self.size), self.shards(total, x.shape[concat])
        parts = [xp.take(x, xp.arange(s.start, s.stop), split) for s in partition.split(x.shape[split], self.size)]
        shapes = [list(part.shape) for part in parts]
        incoming = []
        for n in in_rows:
            shape = list(x.shape)
            shape[split], shape[concat] = out_rows[self.rank], n
            incoming.append(shape)
        sent = xp.concatenate([part.reshape(-1) for part in parts])
        counts = [math.prod(shape) for shape in incoming]
        pending = self.all_to_all_v(sent, [math.prod(shape) for shape in shapes], counts)

        def join(y: Array) -> Array:
            ends = [sum(counts[: r + 1]) for r in range(self.size)]
            pieces = [y[e - c : e].reshape(s) for e, c, s in zip(ends, counts, incoming, strict=True)]
            return xp.concatenate(pieces, concat)

        return _then(pending, join)

    def all_gather_v(self, x: Array, rows: Sequence[int]) -> Pending:
        rest = x.shape[1:]
        if len(x) != rows[self.rank]:
            raise ValueError(f"all_gather: this rank's shard has {len(x)} rows, not {rows[self.rank]}")
        width = math.prod(rest)
        self.traffic.count("all_gather", (self.size - 1) * x.nbytes)
        counts = [n * width for n in rows]
        pending = self._start("all_gather", x, sum(counts), None, counts, self._all_gather, _flat(x), counts)
        return _then(pending, lambda y: y.reshape(sum(rows), *rest))

    def reduce_scatter_v(self, x: Array, rows: Sequence[int]) -> Pending:
        rest = x.shape[1:]
        width = math.prod(rest)
        self.traffic.count("reduce_scatter", (x.size - rows[self.rank] * width) * self._summed(x))
        counts = [n * width for n in rows]
        pending = self._start("reduce_scatter", x, x.size, None, counts, self._reduce_scatter, _flat(x), counts)
        return _then(pending, lambda y: y.reshape(rows[self.rank], *rest))

    def all_to_all_v(self, x: Array, sent: Sequence[int], received: Sequence[int]) -> Pending:
        rest = x.shape[1:]
        width = math.prod(rest)
        self.traffic.count("all_to_all", x.nbytes - sent[self.rank] * width * x.itemsize)
        out, into = [n * width for n in sent], [n * width for n in received]
        pending = self._start("all_to_all", x, x.size, None, out + into, self._all_to_all, _flat(x), out, into)
        return _then(pending, lambda y: y.reshape(sum(received), *rest))

    @abstractmethod
    def duplicate(self) -> MPI.Intracomm:
        """A new MPI communicator of the same ranks, in the same order. Collective."""

    def _summed(self, x: Array) -> int:
        """Bytes of an element in the messages of a sum."""
        return int(x.itemsize)

    def _start(
        self,
        operation: str,
        x: Array,
        count: int,
        root: int | None,
        counts: list[int] | None,
        start: Callable[..., Pending],
        *args: Any,
    ) -> Pending:
        """``start(*args)``: every collective goes through here, to be recorded and, if so wished, checked first.
        ``counts``: of every rank's part; of an all_to_all what is sent to each, then what comes from each."""
        flight = self.flight
        if flight is None:
            return start(*args)
        if (replay := noting()) is not None:
            replay.begins.append(partial(self._again, called_at(), operation, x.dtype, count, root, counts))
            return start(*args)
        record = flight.begin(operation, x.dtype, count, root)
        pending = start(*args) if self.check is None else self.check(record, counts, start, *args)
        pending.record = record
        return pending

    def _message(
        self, operation: str, dtype: Any, count: int, peer: int, tag: int, start: Callable[..., Pending], *args: Any
    ) -> Pending:
        """The same for a message."""
        flight = self.flight
        if flight is None:
            return start(*args)
        record = flight.begin(operation, dtype, count, peer, tag)
        pending = start(*args)
        pending.record = record
        return pending

    def _again(
        self, site: Site, operation: str, dtype: Any, count: int, root: int | None, counts: list[int] | None
    ) -> Record:
        """What ``_start`` does beside ``start``: the operation runs in a graph."""
        assert self.flight is not None
        record = self.flight.begin(operation, dtype, count, root, site=site)
        if self.check is not None:
            self.check(record, counts, Pending, None).wait()
        return record

    @abstractmethod
    def _all_reduce(self, x: Array, op: Op, out: Array | None) -> Pending: ...

    @abstractmethod
    def _broadcast(self, x: Array, root: int) -> Pending: ...

    @abstractmethod
    def _send(self, x: Array, peer: int, tag: int) -> Pending: ...

    @abstractmethod
    def _recv(self, shape: tuple[int, ...], dtype: Any, peer: int, tag: int, like: Array) -> Pending: ...

    @abstractmethod
    def _all_gather(self, x: Array, counts: list[int]) -> Pending: ...

    @abstractmethod
    def _reduce_scatter(self, x: Array, counts: list[int]) -> Pending: ...

    @abstractmethod
    def _all_to_all(self, x: Array, sent: list[int], received: list[int]) -> Pending: ...


_REDUCTIONS: dict[Op, str] = {"sum": "all_reduce", "max": "all_reduce max"}


def _flat(x: Array) -> Array:
    return array_module(x).ascontiguousarray(x).reshape(-1)


def _then(pending: Pending, finish: Callable[[Array], Array]) -> Pending:
    """``pending`` with one more step after those it has."""
    first = pending.finish
    pending.finish = finish if first is None else lambda y: finish(first(y))
    return pending
