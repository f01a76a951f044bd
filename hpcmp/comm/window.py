"""WindowCommunicator: collectives of ranks on one node through memory that they share, instead of MPI's messages.

    all_reduce       rank r sums part r of a piece and copies the other parts out of where they were summed; of a small
                     message every rank sums the whole
    reduce_scatter   rank r sums part r
    all_gather       each rank copies every other's shard
    broadcast        each rank copies the root's array

A rank copies in what others need of its array, its own part excepted, and reads the others' straight from their buffers
(``staging.py``): with n ranks an all-reduce of M bytes copies 2 (n - 1) / n M in and out, and adds 1 / n M n times.
Sums are those of the ranks in order, ((x_0 + x_1) + x_2) + ..., whatever the pieces are: the same bits on every rank
and in every run.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import partition
from ..arrays import Array, is_half
from ..process import cores
from .base import Op, Pending
from .mpi import MpiCommunicator, _into
from .staging import HEADER, LINE, Slots, Staging, Transfer

if TYPE_CHECKING:
    from mpi4py import MPI

log = logging.getLogger("hpcmp")

Sizes = Mapping[str, tuple[float, float]]

#: [least, most) bytes of a whole message for which the window is faster than MPI itself (docs/node.md has the figures):
#: below, calls from Python cost more than the copies; above, MPI's single copy from process to process costs least.
SIZES: Sizes = {
    "all_reduce": (4 * 2**10, math.inf),
    "reduce_scatter": (128 * 2**10, math.inf),
    "all_gather": (128 * 2**10, 8 * 2**20),
    "broadcast": (16 * 2**10, 32 * 2**20),
}
EVERY: Sizes = dict.fromkeys(SIZES, (0, math.inf))
SLOTS = 4  # of a buffer: a piece of a large message is one of them, so that a rank may be that many ahead of another
DIRECT = 512 * 2**10  # bytes of others up to which every rank adds up a whole all-reduce: it waits once, not twice

_OPS: dict[Op, np.ufunc] = {"sum": np.add, "max": np.maximum}


def shared(comm: MPI.Intracomm, size: int, sizes: Sizes = SIZES, *, staged: bool = False) -> MpiCommunicator:
    """``comm``, whose ranks share a node, with a window of ``size`` bytes a rank; an ``MpiCommunicator`` where there is
    no room for one, or MPI has none, which the log tells once. Collective."""
    from mpi4py import MPI

    if comm.size == 1:
        return MpiCommunicator(comm, staged=staged)
    problem = no_room(comm.size * (size + HEADER))
    if not comm.allreduce(bool(problem), MPI.LOR):
        try:
            return WindowCommunicator(comm, size, sizes, staged=staged)
        except (MPI.Exception, NotImplementedError) as error:
            problem = str(error)
    if problem:
        _tell(problem)
    return MpiCommunicator(comm, staged=staged)


def cores_for_all(nodes: Sequence[int], comm: MPI.Intracomm) -> bool:
    """Whether no rank of ``comm``, which are on ``nodes``, shares its core: else one that waits takes it from one that
    others wait for. Collective."""
    allowed: dict[int, set[int]] = {}
    for node, mine in zip(nodes, comm.allgather(cores()), strict=True):
        allowed.setdefault(node, set()).update(mine)
    return all(count <= len(allowed[node]) for node, count in Counter(nodes).items())


class WindowCommunicator(MpiCommunicator):
    """An ``MpiCommunicator`` of ranks on one node that moves host arrays, of the ``sizes`` of each operation, through
    shared memory, of which each rank has ``size`` bytes; all_to_all, messages and GPU arrays are left to MPI.

    As in ``HierarchicalCommunicator``, MPI knows nothing of what is under way: ``test`` and ``wait`` of any ``Pending``
    of the process take the steps that are due, and a rank must not block in an MPI call of another kind meanwhile.
    """

    def __init__(
        self, comm: MPI.Intracomm, size: int = 6 * 2**20, sizes: Sizes = SIZES, *, staged: bool = False
    ) -> None:
        super().__init__(comm, staged=staged)
        self.sizes = sizes
        self.staging = Staging(comm, max(LINE * comm.size, size // SLOTS // LINE * LINE), SLOTS)

    def close(self) -> None:
        self.staging.close()
        super().close()

    def _takes(self, operation: str, x: Array, elements: int) -> bool:
        """Whether a message of so many elements in all goes through the window: the same on every rank."""
        least, most = self.sizes[operation]
        return self.size > 1 and isinstance(x, np.ndarray) and least <= elements * x.itemsize < most

    def _sums(self, operation: str, x: Array, elements: int) -> bool:
        """``_takes``, of numbers that NumPy sums as they are: those of 16 bits come again, in 32."""
        return not is_half(x.dtype) and x.dtype.kind in "iuf" and self._takes(operation, x, elements)

    def _room(self, x: Array, parts: int = 1) -> int:
        """How many elements of each of ``parts`` parts a slot has room for."""
        return int(self.staging.slot // x.itemsize // parts)

    def _all_reduce(self, x: Array, op: Op, out: Array | None) -> Pending:
        if not self._sums("all_reduce", x, x.size):
            return super()._all_reduce(x, op, out)
        send = np.ascontiguousarray(x).reshape(-1)
        result: Array = out
        if out is None or not out.flags.c_contiguous or out.dtype != x.dtype:
            result = np.empty(x.shape, x.dtype)
        y = result.reshape(-1)
        if x.nbytes * (self.size - 1) <= DIRECT and x.nbytes <= self.staging.slot:
            transfer = self._sum_everywhere(send, op, y)
        else:
            transfer = self._sum(send, op, y, partition.sizes(x.size, self.size), everywhere=True)
        return Pending(result, [transfer], lambda found: _into(out, found))

    def _reduce_scatter(self, x: Array, counts: list[int]) -> Pending:
        if not self._sums("reduce_scatter", x, sum(counts)):
            return super()._reduce_scatter(x, counts)
        y = np.empty(counts[self.rank], x.dtype)
        return Pending(y, [self._sum(x, "sum", y, counts, everywhere=False)])

    def _sum_everywhere(self, x: NDArray[Any], op: Op, y: NDArray[Any]) -> Transfer:
        n, combine = x.size, _OPS[op]

        def put(slots: Slots, _: int) -> None:
            slots[self.rank][:n] = x

        def take(slots: Slots, _: int) -> None:
            combine(slots[0][:n], slots[1][:n], out=y)
            for other in slots[2:]:
                combine(y, other[:n], out=y)

        return Transfer(self.staging, x.dtype, int(n > 0), put, None, take)

    def _sum(self, x: NDArray[Any], op: Op, y: NDArray[Any], counts: list[int], *, everywhere: bool) -> Transfer:
        """Part r of ``x`` has ``counts[r]`` elements; ``y`` is of this rank's part, or ``everywhere`` of all parts.

        Piece i has ``room`` elements of each part from i ``room`` on, in a place of a slot for each part.
        """
        combine, room, me = _OPS[op], self._room(x, self.size), self.rank
        starts = [sum(counts[:r]) for r in range(self.size)]

        def part(r: int, i: int) -> slice:
            return slice(starts[r] + min(i * room, counts[r]), starts[r] + min((i + 1) * room, counts[r]))

        def place(r: int, i: int) -> slice:
            piece = part(r, i)
            return slice(r * room, r * room + piece.stop - piece.start)

        def put(slots: Slots, i: int) -> None:
            for r in range(self.size):
                if r != me:
                    slots[me][place(r, i)] = x[part(r, i)]

        def reduce(slots: Slots, i: int) -> None:
            here = place(me, i)
            terms = [x[part(me, i)] if r == me else slots[r][here] for r in range(self.size)]
            total = slots[me][here] if everywhere else y[i * room : (i + 1) * room]
            combine(terms[0], terms[1], out=total)
            for term in terms[2:]:
                combine(total, term, out=total)
            if everywhere:
                y[part(me, i)] = total  # now, since it is in the cache

        def take(slots: Slots, i: int) -> None:
            for r in range(self.size):
                if r != me:
                    y[part(r, i)] = slots[r][place(r, i)]

        pieces = -(-max(counts) // room)
        return Transfer(self.staging, x.dtype, pieces, put, reduce, take if everywhere else None)

    def _all_gather(self, x: Array, counts: list[int]) -> Pending:
        if not self._takes("all_gather", x, sum(counts)):
            return super()._all_gather(x, counts)
        y, room, me = np.empty(sum(counts), x.dtype), self._room(x, 2), self.rank
        starts, others = [sum(counts[:r]) for r in range(self.size)], [r for r in range(self.size) if r != me]
        own = y[starts[me] :][: counts[me]]

        def put(slots: Slots, i: int) -> None:
            piece = x[i * room : (i + 1) * room]
            slots[me][: piece.size] = piece
            own[i * room : (i + 1) * room] = piece  # now, since it is in the cache

        def take(slots: Slots, i: int) -> None:
            for r in others:
                part = y[starts[r] : starts[r] + counts[r]][i * room : (i + 1) * room]
                part[:] = slots[r][: part.size]

        return Pending(y, [Transfer(self.staging, x.dtype, -(-max(counts) // room), put, None, take)])

    def _broadcast(self, x: Array, root: int) -> Pending:
        if not self._takes("broadcast", x, x.size):
            return super()._broadcast(x, root)
        here, room = self.rank == root, self._room(x, 2)
        result = np.ascontiguousarray(x).reshape(x.shape) if here else np.empty(x.shape, x.dtype)
        y = result.reshape(-1)

        def put(slots: Slots, i: int) -> None:
            piece = y[i * room : (i + 1) * room]
            slots[root][: piece.size] = piece

        def take(slots: Slots, i: int) -> None:
            piece = y[i * room : (i + 1) * room]
            piece[:] = slots[root][: piece.size]

        steps = {"put": put} if here else {"take": take}
        return Pending(result, [Transfer(self.staging, x.dtype, -(-x.size // room), **steps)])


_told: set[str] = set()


def _tell(problem: str) -> None:
    """One line of the log for each kind of problem."""
    if problem not in _told:
        _told.add(problem)
        log.warning("no shared memory for collectives within a node, which MPI's own replace: %s", problem)


def no_room(size: int) -> str:
    """Why ``size`` bytes would not fit into /dev/shm, where MPIs keep shared memory; "" if they do.

    A file there grows as it is written, and a process that writes beyond the end of the file system dies of SIGBUS.
    """
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return ""
    free = found.f_bavail * found.f_frsize
    return "" if free >= 2 * size else f"/dev/shm has {free / 2**20:.0f} MiB left (container: --shm-size)"
