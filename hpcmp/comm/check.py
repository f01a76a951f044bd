"""Check: the calls of all ranks are compared before a collective starts (``train.check_collectives``).

Ranks that disagree on a collective's kind, its counts, its dtype or its root get wrong sums without a word from an MPI,
a crash or a hang. Here each call first tells the others what it is going to do, over a communicator of its own, and
they start when all have agreed. Nothing blocks at the call: as long as some rank has not come to it, the collective
waits, and ``wait`` and ``test`` of any ``Pending`` of the process start it when its turn has come.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MismatchError
from .base import DRIVERS, Pending, give_way
from .recorder import Record

if TYPE_CHECKING:
    from mpi4py import MPI

_TEXT = 512  # bytes that a call's description has room for


class Check:
    """Of one communicator: ``comm`` is a duplicate of it, this object's from now on."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.comm = comm
        self.calls: deque[_Call] = deque()
        self.failed: MismatchError | None = None

    def __call__(self, record: Record, counts: list[int] | None, start: Callable[..., Pending], *args: Any) -> Pending:
        """``start(*args)``, once every rank has come to the same call; ``counts``: of the ranks' parts."""
        call = _Call(self, record, counts, lambda: start(*args))
        if not self.calls:
            DRIVERS.append(self.advance)
        self.calls.append(call)
        return Pending(args[0], [call], lambda _: call.started.wait(), call)

    def advance(self) -> None:
        """Start the calls that all ranks have come to, in order. Raises MismatchError where they differ, on all."""
        if self.failed is not None:
            raise self.failed
        try:
            while self.calls and self.calls[0].request.Test():
                call = self.calls.popleft()
                call.compare()
                call.start()
        except MismatchError as error:
            self.failed = error
            self.calls.clear()
            raise
        finally:
            if not self.calls and self.advance in DRIVERS:
                DRIVERS.remove(self.advance)

    def close(self) -> None:
        """Free the communicator; collective."""
        self.comm.Free()


class _Call:
    """One collective; to ``Pending`` it is a request, with a request's names."""

    def __init__(self, check: Check, record: Record, counts: list[int] | None, start: Callable[[], Pending]) -> None:
        self.check, self.record, self._start = check, record, start
        self.started: Any = None
        size = check.comm.size
        told = {"what": _told(record), "site": record.site[-200:]}
        if record.operation != "all_to_all":
            told["counts"] = str(hash(tuple(counts or ())))
        self.mine = np.zeros(_TEXT + 16 * size, np.uint8)
        text = json.dumps(told, ensure_ascii=True).encode()
        self.mine[: len(text)] = np.frombuffer(text, np.uint8)
        if record.operation == "all_to_all":
            self.mine[_TEXT:] = np.array(counts, np.int64).view(np.uint8)
        self.all = np.zeros((size, len(self.mine)), np.uint8)
        self.request = check.comm.Iallgather(self.mine, self.all)

    def start(self) -> None:
        """Begin what was called."""
        self.started = self._start()

    def compare(self) -> None:
        """Raise MismatchError, the same on every rank, unless all have called the same."""
        flight = self.record.flight
        calls = [json.loads(bytes(row[:_TEXT]).rstrip(b"\0")) for row in self.all]
        # the root may well call from another line than the others, as in `broadcast(x) if root else broadcast(empty)`
        keys = [(c["what"], c.get("counts"), "" if "root" in c["what"] else c["site"]) for c in calls]
        where = f"collective {self.record.sequence} of {flight.axes or 'a group'}"
        if len(set(keys)) > 1:
            groups: dict[tuple[str, str], list[int]] = {}
            for rank, call in zip(flight.ranks, calls, strict=True):
                groups.setdefault((call["what"], call["site"]), []).append(rank)
            if len(groups) == 1:
                raise MismatchError(f"{where}: {calls[0]['what']} at {calls[0]['site']}: ranks differ in their parts")
            said = [f"{ranks_text(ranks)}: {what} at {site}" for (what, site), ranks in groups.items()]
            raise MismatchError(f"{where} differs between ranks: {'; '.join(said)}")
        if calls[0]["what"].startswith("all_to_all"):
            self._compare_parts(where, calls[0]["site"])

    def _compare_parts(self, where: str, site: str) -> None:
        """What each rank of an all_to_all sends to another must be what that one expects."""
        flight, size = self.record.flight, len(self.all)
        counts = np.ascontiguousarray(self.all[:, _TEXT:]).view(np.int64)
        sent, received = counts[:, :size], counts[:, size:]
        for source, target in np.argwhere(sent != received.T).tolist():
            raise MismatchError(
                f"{where}: all_to_all at {site}: rank {flight.ranks[source]} sends {sent[source, target]} elements to "
                f"rank {flight.ranks[target]}, which expects {received[target, source]}"
            )

    def Test(self) -> bool:
        self.check.advance()
        return self.started is not None and self.started.test()

    def Wait(self) -> None:
        tries = 0
        while self.started is None:
            self.check.advance()
            for drive in tuple(DRIVERS):
                drive()
            give_way(tries := tries + 1)


def _told(record: Record) -> str:
    """What all ranks must have alike, as text."""
    count = "" if record.operation == "all_to_all" else f", {record.count}"
    root = "" if record.peer is None else f", root {record.peer}"
    return f"{record.operation} ({np.dtype(record.dtype).name}{count}{root})"


def ranks_text(ranks: list[int]) -> str:
    """``rank 3``, ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
