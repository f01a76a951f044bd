"""Where the time of a step goes on each rank, and which ranks are slow."""

from __future__ import annotations

import logging
import math
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..comm.base import Waited
from ..comm.mesh import Mesh

log = logging.getLogger("hpcmp")

#: Reading the batch; forward and backward; the optimizer; checkpoints; and, out of all of them, waits for other ranks.
PHASES = ("data", "compute", "optimizer", "checkpoint", "wait")
_SLOW = 1.3  # times the median of like ranks
_MUCH = 0.05  # of a step's time, below which no lag is worth a word


class Phases:
    """Seconds of this rank in each of ``PHASES`` since the last ``gather``.

    Ranks of a step end it together, so that its time says nothing of them: a slow rank has a long ``compute`` (or
    another phase of its own), and the others a long ``wait``. On a GPU, whose work is queued, ``compute`` is the time
    until it is queued, and the work itself is in the phase that first looks at a result.
    """

    def __init__(self) -> None:
        #: What makes a range of (kind, name) around a phase, while there is a profile.
        self.ranges: Callable[[Any, str], AbstractContextManager[Any]] | None = None
        self._forget()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """The time of the body is of the phase ``name``, but for the waits in it."""
        start, waited = time.perf_counter(), Waited.seconds
        try:
            with self.ranges("phase", name) if self.ranges else nullcontext():
                yield
        finally:
            waited = Waited.seconds - waited
            self.seconds[name] += time.perf_counter() - start - waited
            self.seconds["wait"] += waited

    def gather(self, mesh: Mesh) -> NDArray[np.float64]:
        """Seconds a step of every rank, (ranks, phases), and begin anew. Collective over the mesh."""
        mine = np.array([list(self.seconds.values())]) / max(1, self.steps)
        self._forget()
        return np.asarray(mesh[Mesh.axes].all_gather(mine).wait())

    def _forget(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.steps = 0


def spread(table: NDArray[np.float64]) -> dict[str, dict[str, float]]:
    """What the metrics keep of a table of ``Phases.gather``: of each phase the mean over ranks, the least and the most,
    and the ranks that have these."""
    found: dict[str, dict[str, float]] = {}
    for name, column in zip(PHASES, table.T, strict=True):
        fastest, slowest = int(column.argmin()), int(column.argmax())
        found[name] = {
            "mean": float(column.mean()),
            "least": float(column[fastest]),
            "fastest": fastest,
            "most": float(column[slowest]),
            "slowest": slowest,
        }
    return found


def lags(table: NDArray[np.float64], alike: Sequence[int]) -> list[tuple[str, int, int]]:
    """(phase, its slowest rank, its fastest rank) where one rank is far slower than those like it.

    alike: of each rank a number, the same for those that have the same work, such as its pipeline stage. Far: 1.3 times
    their median (without the rank itself), and more than a twentieth of a step.
    """
    found, step, kinds = [], float(table.sum(1).mean()), np.asarray(alike)
    for name, column in zip(PHASES, table.T, strict=True):
        if name == "wait":  # long where others are slow
            continue
        lag, slowest, fastest = 0.0, 0, 0
        for kind in np.unique(kinds):
            ranks = np.flatnonzero(kinds == kind)
            most = ranks[column[ranks].argmax()]
            usual = float(np.median(column[ranks[ranks != most]])) if len(ranks) > 1 else math.inf
            if column[most] > max(_SLOW * usual, usual + _MUCH * step, usual + lag):
                lag, slowest, fastest = float(column[most] - usual), int(most), int(ranks[column[ranks].argmin()])
        if lag:
            found.append((name, slowest, fastest))
    return found


class Watch:
    """Looks at all ranks' phases at each line of the log: what it finds is a record of the metrics, and a warning when
    a rank falls behind that did not before."""

    def __init__(self, mesh: Mesh, phases: Phases) -> None:
        self.mesh, self.phases = mesh, phases
        self.alike = [int(mesh.place(rank)["pp"]) for rank in range(mesh.size)]
        self.known: set[tuple[str, int]] = set()

    def look(self, step: int) -> dict[str, Any] | None:
        """The record, on rank 0, of the steps since the last look; ``step`` are done. Collective over the mesh."""
        steps, table = self.phases.steps, self.phases.gather(self.mesh)
        log.debug("step %d: %s", step, _text(table[self.mesh.rank]))
        if self.mesh.rank:
            return None
        late = lags(table, self.alike)
        for name, slow, fast in late:
            if (name, slow) not in self.known:
                seconds = table[:, PHASES.index(name)]
                told = f"{name} takes {seconds[slow]:.3g} s a step there"
                log.warning(
                    "step %d: %s is slow: %s, %.3g s on %s", step, self._who(slow), told, seconds[fast], self._who(fast)
                )
        self.known = {(name, slow) for name, slow, _ in late}
        slow_ranks = [{"phase": name, "rank": slow, "host": self._host(slow)} for name, slow, _ in late]
        return {"step": step - 1, "of_steps": steps, "phases": spread(table), "slow": slow_ranks}

    def _who(self, rank: int) -> str:
        return f"rank {rank} on {self._host(rank)}"

    def _host(self, rank: int) -> str:
        topology = self.mesh.topology
        return topology.names[topology.nodes[rank]] if topology.names else socket.gethostname()


def _text(seconds: NDArray[np.float64]) -> str:
    return ", ".join(f"{name} {value:.3g} s" for name, value in zip(PHASES, seconds, strict=True))
