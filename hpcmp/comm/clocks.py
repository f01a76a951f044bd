"""How far the clocks of other ranks are ahead of rank 0's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

_ROUNDS = 8  # of messages, of which the fastest counts


def ahead(
    comm: MPI.Intracomm, others: Iterable[int], clock: Callable[[], float] = time.time
) -> dict[int, tuple[float, float]]:
    """On rank 0: of each of ``others``, how many seconds its ``clock`` is ahead of rank 0's, and by how many at most
    that may be wrong; empty elsewhere. Collective over rank 0 and ``others``.

    Each answers with its time; what it says is taken for the middle of the time between question and answer, which is
    wrong by half of that at most. The fastest answer of a few counts. Cristian, "Probabilistic clock synchronization",
    1989.
    """
    found = {}
    for other in others:
        if comm.rank == 0:
            best = (float("inf"), 0.0)
            for _ in range(_ROUNDS):
                began, asked = time.perf_counter(), clock()
                theirs = comm.sendrecv(None, dest=other, source=other)
                took = time.perf_counter() - began
                best = min(best, (took, theirs - asked - took / 2))
            found[other] = best[1], best[0] / 2
        elif comm.rank == other:
            for _ in range(_ROUNDS):
                comm.recv(source=0)
                comm.send(clock(), dest=0)
    return found
