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

from .base import DRIVERS, give_way

if TYPE_CHECKING:
    from mpi4py import MPI

LINE = 64  # bytes of a cache line
HEADER = 4096  # bytes before a rank's slots: its counters
PUT, REDUCED, TAKEN = range(3)  # a rank's steps of a piece
_COUNTERS = [step * LINE // 8 for step in range(3)]  # where a rank's counters of them are, in units of 8 bytes

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
        self.staging, self.left = staging, pieces
        self.views = staging.views(dtype)
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

        self.rank = comm.rank
        self.slot, self.slots = slot, slots
        self.window = MPI.Win.Allocate_shared(HEADER + slot * slots, 1, comm=comm)
        self.window.Lock_all(MPI.MODE_NOCHECK)
        queried: list[Any] = [self.window.Shared_query(rank)[0] for rank in range(comm.size)]
        memory = [memoryview(each).cast("B") for each in queried]
        self._counters = [m[:HEADER].cast("q") for m in memory]
        self._memory = [np.frombuffer(m, np.uint8, offset=HEADER) for m in memory]
        self._views: dict[np.dtype[Any], list[Slots]] = {}
        self._mine = self._counters[self.rank]
        for at in _COUNTERS:
            self._mine[at] = 0
        self._done = [0, 0, 0]  # how many pieces this rank has put, reduced and taken
        self._seen = [0, 0, 0]  # how many all ranks had, when it last looked
        self._idle = 0  # looks in vain since the last step
        self._never = MPI.Grequest.Start()  # its test has every MPI progress; a probe in vain does not in MPICH
        self._queues: list[deque[tuple[Transfer, int]]] = [deque(), deque(), deque()]
        self.window.Sync()
        comm.Barrier()

    def begin(self, transfer: Transfer, pieces: int) -> None:
        """Queue the pieces of a message behind those of the messages before it, and do what can be done now."""
        if not pieces:
            return
        if not any(self._queues):
            DRIVERS.append(self.advance)
        self._queues[0].extend([(transfer, i) for i in range(pieces)])
        self.advance()

    def advance(self) -> None:
        """Take every step whose turn has come: those first that free slots. Where there is none, let MPI progress: a
        message of another kind may be what another rank waits for. That costs more than a look, and at first is done at
        every eighth."""
        moved, step = False, TAKEN
        while step >= PUT:
            if self._queues[step] and self._may(step):
                self._take_step(step)
                moved, step = True, TAKEN
            else:
                step -= 1
        if not any(self._queues):
            if self.advance in DRIVERS:
                DRIVERS.remove(self.advance)
        self._idle = 0 if moved else self._idle + 1
        if self._idle % 8 == 7 or self._idle > 1000:
            self._never.Test()

    def close(self) -> None:
        """Free the memory, when messages that nobody waited for are through; collective."""
        while any(self._queues):
            for drive in tuple(DRIVERS):
                drive()
            give_way(self._idle)
        self._never.Complete()
        self._never.Wait()
        self._mine, self._counters, self._memory, self._views = memoryview(b""), [], [], {}
        self.window.Unlock_all()
        self.window.Free()

    def _may(self, step: int) -> bool:
        """Whether the next piece of a step may take it: put, if all have taken what its slot held; reduce, if all have
        put it; take, if all have reduced it."""
        if step != PUT and self._queues[step][0][0].steps[step] is None:
            return True
        before = (step - 1) % 3
        turn = self._done[step] - (self.slots if step == PUT else 0)
        if self._seen[before] <= turn:
            counter = _COUNTERS[before]
            self._seen[before] = min([counters[counter] for counters in self._counters])
            if self._seen[before] <= turn:
                return False
            self.window.Sync()
        return True

    def _take_step(self, step: int) -> None:
        transfer, piece = self._queues[step].popleft()
        work, turn = transfer.steps[step], self._done[step]
        if work is not None:
            work(transfer.views[turn % self.slots], piece)
        self.window.Sync()
        self._done[step] = self._mine[_COUNTERS[step]] = turn + 1
        if step == TAKEN:
            transfer.left -= 1
            return
        if step == PUT and transfer.steps[REDUCED] is None and not self._queues[REDUCED]:  # it needs no turn of its own
            self._done[REDUCED] = self._mine[_COUNTERS[REDUCED]] = turn + 1
            step = REDUCED
        self._queues[step + 1].append((transfer, piece))

    def views(self, dtype: np.dtype[Any]) -> list[Slots]:
        """Of every slot the arrays of all ranks."""
        if dtype not in self._views:
            view = partial(self._view, dtype)
            self._views[dtype] = [[view(m, s) for m in self._memory] for s in range(self.slots)]
        return self._views[dtype]

    def _view(self, dtype: np.dtype[Any], memory: NDArray[np.uint8], s: int) -> NDArray[Any]:
        room = self.slot // dtype.itemsize * dtype.itemsize
        return memory[s * self.slot :][:room].view(dtype)
