"""Staging: a buffer of each rank in memory that all of them see, through which messages go piece by piece.

A piece takes three steps on every rank:

    put      copy what the others need of this rank's array into this rank's buffer
    reduce   once every rank has put: sum up this rank's part, straight from the others' buffers
    take     once every rank has reduced: copy the others' parts out of their buffers

Each rank counts how many pieces have taken each step, in counters that all see. That is all the synchronisation there
is: a step waits until the counters of all ranks have passed the step before, and a buffer's slot is written again when
all have taken what it held. All messages of a communicator make one sequence of pieces, so that any number of them may
be under way, and no rank needs to be in the same call as another.

Memory order: a rank calls MPI_Win_sync, a full barrier, after the reads and writes of a step and before it raises a
counter, and after it has read a counter and before the reads and writes that it allows. Counters are aligned 8-byte
integers, each in a cache line of its own, and only one rank writes them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .base import DRIVERS

if TYPE_CHECKING:
    from mpi4py import MPI

LINE = 64  # bytes of a cache line
HEADER = 4096  # bytes before a rank's slots: its counters
PUT, REDUCED, TAKEN = 0, LINE // 8, 2 * LINE // 8  # where they are, in units of 8 bytes

Slots = list[NDArray[Any]]
Step = Callable[[Slots, int], None]  # of one slot of every rank, and the number of the piece within its message


class Transfer:
    """One message of ``pieces`` pieces; to ``Pending`` it is a request, with a request's names.

    A step that this rank has nothing to do in is None: then it waits for nobody either.
    """

    def __init__(
        self,
        staging: Staging,
        dtype: Any,
        pieces: int,
        put: Step | None = None,
        reduce: Step | None = None,
        take: Step | None = None,
    ) -> None:
        self.staging, self.dtype, self.left = staging, np.dtype(dtype), pieces
        self.steps = put, reduce, take
        staging.begin(self, pieces)

    def Test(self) -> bool:
        if self.left:
            self.staging.advance()
        return not self.left

    def Wait(self) -> None:
        """Nothing: it is in DRIVERS until it is there, and ``Pending.wait`` calls those before this."""


class Staging:
    """``slots`` slots of ``slot`` bytes for each rank of ``comm``, whose ranks share memory. Collective; MPI.Exception
    where there is no such memory. Physical memory is taken as slots are first written."""

    def __init__(self, comm: MPI.Intracomm, slot: int, slots: int) -> None:
        from mpi4py import MPI

        self.comm, self.rank = comm, comm.rank
        self.slot, self.slots = slot, slots
        self.window = MPI.Win.Allocate_shared(HEADER + slot * slots, 1, comm=comm)
        self.window.Lock_all(MPI.MODE_NOCHECK)
        queried: list[Any] = [self.window.Shared_query(rank)[0] for rank in range(comm.size)]
        memory = [memoryview(each).cast("B") for each in queried]
        self._counters = [m[:HEADER].cast("q") for m in memory]
        self._memory = [np.frombuffer(m, np.uint8, offset=HEADER) for m in memory]
        self._slots: dict[np.dtype[Any], list[Slots]] = {}
        for at in (PUT, REDUCED, TAKEN):
            self._counters[self.rank][at] = 0
        self._done = [0, 0, 0]  # how many pieces this rank has put, reduced and taken
        self._seen = {PUT: 0, REDUCED: 0, TAKEN: 0}  # how many all ranks had, when it last looked
        self._queues: list[deque[tuple[Transfer, int]]] = [deque(), deque(), deque()]
        self.window.Sync()
        comm.Barrier()

    def begin(self, transfer: Transfer, pieces: int) -> None:
        """Queue the pieces of a message behind those of the messages before it, and do what can be done now."""
        if not pieces:
            return
        if not any(self._queues):
            DRIVERS.append(self.advance)
        self._queues[0].extend((transfer, i) for i in range(pieces))
        self.advance()

    def advance(self) -> None:
        """Take every step whose turn has come: those first that free slots. Where there is none, let MPI progress: a
        message of another kind may be what another rank waits for."""
        moved = False
        while self._take() or self._reduce() or self._put():
            moved = True
        if not any(self._queues):
            if self.advance in DRIVERS:
                DRIVERS.remove(self.advance)
        elif not moved:
            self.comm.Iprobe()

    def close(self) -> None:
        """Free the memory; collective."""
        self._counters, self._memory, self._slots = [], [], {}
        self.window.Unlock_all()
        self.window.Free()

    def _put(self) -> bool:
        queue, turn = self._queues[0], self._done[0]
        return bool(queue) and self._passed(TAKEN, turn - self.slots) and self._step(0, PUT)

    def _reduce(self) -> bool:
        queue, turn = self._queues[1], self._done[1]
        return bool(queue) and (queue[0][0].steps[1] is None or self._passed(PUT, turn)) and self._step(1, REDUCED)

    def _take(self) -> bool:
        queue, turn = self._queues[2], self._done[2]
        if not queue or not (queue[0][0].steps[2] is None or self._passed(REDUCED, turn)):
            return False
        transfer = queue[0][0]
        self._step(2, TAKEN)
        transfer.left -= 1
        return True

    def _step(self, number: int, counter: int) -> bool:
        transfer, piece = self._queues[number].popleft()
        step, turn = transfer.steps[number], self._done[number]
        if step is not None:
            step(self._views(transfer.dtype)[turn % self.slots], piece)
        self.window.Sync()
        self._done[number] = self._counters[self.rank][counter] = turn + 1
        if number < 2:
            self._queues[number + 1].append((transfer, piece))
        return True

    def _passed(self, counter: int, turn: int) -> bool:
        """Whether every rank's counter is beyond piece ``turn``."""
        if self._seen[counter] <= turn:
            self._seen[counter] = min(counters[counter] for counters in self._counters)
            if self._seen[counter] <= turn:
                return False
            self.window.Sync()
        return True

    def _views(self, dtype: np.dtype[Any]) -> list[Slots]:
        """Of every slot the arrays of all ranks."""
        if dtype not in self._slots:
            view = partial(self._view, dtype)
            self._slots[dtype] = [[view(m, s) for m in self._memory] for s in range(self.slots)]
        return self._slots[dtype]

    def _view(self, dtype: np.dtype[Any], memory: NDArray[np.uint8], s: int) -> NDArray[Any]:
        room = self.slot // dtype.itemsize * dtype.itemsize
        return memory[s * self.slot :][:room].view(dtype)
