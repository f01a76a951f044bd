"""Flight recorder: the last operations of this process, for who asks afterwards why a job hangs.

Every operation of a communicator begins a ``Record`` in ``RECORDER``, a ring of the last ``LENGTH`` of them. It is
always on: a record costs about a microsecond (``benchmarks/overhead.py``), since what is dear to find out, such as the
line that a call stands in, is left to ``Recorder.snapshot``.

A communicator numbers its collectives 1, 2, ... in the order in which they are called, which must be the same on every
of its ranks. So whatever two ranks have under one number must be the same call, and a rank whose last number is below
another's has not come to it yet: ``hpcmp.training.diagnosis`` compares the records of all ranks. Messages (``send``,
``recv``) have no numbers but a tag.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np

LENGTH = 1024  # records that are kept

_PACKAGE = Path(__file__).resolve().parents[1]
#: Files whose lines tell nothing about a call: they pass it on.
_PASS_ON = tuple(
    str(_PACKAGE / name) for name in ("comm/", "collectives.py", "checkpoint/agree.py", "checkpoint/moves.py")
)
_inside: dict[str, bool] = {}  # by file name: whether it is one of these

#: A code object, and the instruction within it.
Site = tuple[CodeType, int]


class Record:
    """One operation: what was called, where, and when, in seconds of ``time.monotonic``.

    count: elements of the whole message, on every rank the same: of the result of an ``all_gather``, of the argument of
    all else; of an ``all_to_all`` those of this rank's argument. peer: the root, or the other side of a message, as a
    number within the group. waits: since when the process blocks in it. event: tells of an operation on a GPU, for
    which nobody blocks, whether it is over. failed: whether an error has ended the wait for it.
    """

    __slots__ = tuple(
        "flight sequence operation dtype count peer tag code instruction start waits end event failed".split()
    )

    flight: Flight
    sequence: int | None
    operation: str
    dtype: Any
    count: int | None
    peer: int | None
    tag: int | None
    code: CodeType
    instruction: int
    start: float
    waits: float | None
    end: float | None
    event: Any
    failed: bool

    def block(self) -> None:
        """The process waits for it from now on."""
        self.waits = time.monotonic()
        RECORDER.blocked.append(self)

    def leave(self, done: bool = True) -> None:
        """The process waits no more: it is over, or an error has ended the wait."""
        if done:
            self.finish()
        else:
            self.failed = True
        RECORDER.blocked.remove(self)

    def unblock(self) -> None:
        """The process goes on, and the operation does too."""
        RECORDER.blocked.remove(self)
        self.waits = None

    def finish(self) -> None:
        """It is over, unless it runs on a GPU: that is asked later."""
        if self.event is None:
            self.end = time.monotonic()

    @property
    def site(self) -> str:
        """Where it was called, outside of this package's lower floors: ``hpcmp/layers/linear.py:88``."""
        lines = (line for start, end, line in self.code.co_lines() if start <= self.instruction < end)
        path = Path(self.code.co_filename)
        shown = path.relative_to(_PACKAGE.parent) if path.is_relative_to(_PACKAGE) else path
        return f"{shown}:{next(lines, 0)}"


class Flight:
    """The records of one communicator: ``axes`` of the mesh ("all" for its control plane), and ``ranks``, numbers in
    MPI's world. ``number`` tells it from those made before, of the same axes and ranks; ``begun`` is the number of its
    last collective."""

    def __init__(self, axes: str, ranks: Sequence[int], begun: int = 0) -> None:
        self.axes, self.ranks = axes, tuple(ranks)
        self.begun = begun
        self.last: Record | None = None
        key = self.axes, self.ranks
        self.number = RECORDER.made[key] = RECORDER.made.get(key, 0) + 1
        RECORDER.flights.append(self)

    def begin(
        self,
        operation: str,
        dtype: Any = None,
        count: int | None = None,
        peer: int | None = None,
        tag: int | None = None,
        site: Site | None = None,
    ) -> Record:
        """A record of an operation that starts now, called at ``site`` (by default where this is); with a ``tag`` it is
        a message. After ``RECORDER.halt`` none does, and this does not return."""
        if RECORDER.halted:
            threading.Event().wait()
        record = Record()
        record.flight, record.operation, record.dtype = self, operation, dtype
        record.count, record.peer, record.tag = count, peer, tag
        if tag is None:
            self.begun = record.sequence = self.begun + 1
        else:
            record.sequence = None
        record.code, record.instruction = site or called_at()
        record.waits = record.end = record.event = None
        record.failed = False
        record.start = time.monotonic()
        RECORDER.records.append(record)
        self.last = record
        return record

    def blocking(self, operation: str, peer: int | None = None) -> _Blocking:
        """``with flight.blocking("gather_objects"): ...`` records a call that blocks."""
        return _Blocking(self, operation, peer)

    def close(self) -> None:
        """The communicator is freed."""
        if self in RECORDER.flights:
            RECORDER.flights.remove(self)


class _Blocking:
    def __init__(self, flight: Flight, operation: str, peer: int | None) -> None:
        self.given = flight, operation, peer

    def __enter__(self) -> None:
        flight, operation, peer = self.given
        self.record = flight.begin(operation, peer=peer)
        self.record.block()

    def __exit__(self, *exc: object) -> None:
        self.record.leave(exc[0] is None)


class Recorder:
    """The records of this process. blocked: in which of them its threads wait now. flights: of open communicators."""

    def __init__(self, length: int = LENGTH) -> None:
        self.records: deque[Record] = deque(maxlen=length)
        self.blocked: list[Record] = []
        self.flights: list[Flight] = []
        self.made: dict[tuple[str, tuple[int, ...]], int] = {}
        self.halted = False

    def halt(self) -> None:
        """The process is about to end, and what its operations have yielded may mean nothing: no other begins, so that
        nothing is made of it, no checkpoint for one."""
        self.halted = True

    def keep(self, length: int | None = LENGTH) -> None:
        """Keep the last ``length`` records from now on; None: all of them."""
        self.records = deque(self._all(), maxlen=length)

    def forget(self) -> None:
        """All communicators are given up."""
        for each in (self.records, self.blocked, self.flights, self.made):
            each.clear()

    def overdue(self, seconds: float) -> Record | None:
        """The oldest operation that the process, or a GPU, has waited for longer than this; safe in any thread."""
        before = time.monotonic() - seconds
        held = [record for record in tuple(self.blocked) if record.waits is not None and record.waits < before]
        held += [record for record in self._on_gpu() if record.start < before]
        return min(held, key=lambda record: record.start, default=None)

    def snapshot(self) -> dict[str, Any]:
        """All of it in JSON's types, times in seconds since 1970; safe in any thread."""
        self._on_gpu()
        offset = time.time() - time.monotonic()
        blocked, flights = tuple(self.blocked), list(self.flights)
        records = self._all()
        records = [record for record in blocked if record not in records] + records
        flights += dict.fromkeys(record.flight for record in records if record.flight not in flights)
        groups = [{"axes": f.axes, "ranks": f.ranks, "number": f.number, "begun": f.begun} for f in flights]
        places = {flight: place for place, flight in enumerate(flights)}
        return {"groups": groups, "records": [_plain(record, places, blocked, offset) for record in records]}

    def _all(self) -> list[Record]:
        while True:
            try:
                return list(self.records)
            except RuntimeError:  # another thread has begun one meanwhile
                continue

    def _on_gpu(self) -> list[Record]:
        """Those that run on a GPU still."""
        running = []
        for record in self._all():
            if record.event is not None:
                if record.event.Test():
                    record.event = None
                    record.finish()
                else:
                    running.append(record)
        return running


def _plain(record: Record, places: dict[Flight, int], blocked: Sequence[Record], offset: float) -> dict[str, Any]:
    waits = record.waits if record in blocked else None if record.event is None else record.start
    times = {"start": record.start, "waits": waits, "end": record.end}
    state = "failed" if record.failed else "started" if record.end is None else "finished"
    return {
        "group": places[record.flight],
        "sequence": record.sequence,
        "operation": record.operation,
        "dtype": None if record.dtype is None else np.dtype(record.dtype).name,
        "count": record.count,
        "peer": record.peer,
        "tag": record.tag,
        "site": record.site,
        "state": state,
        **{name: None if at is None else at + offset for name, at in times.items()},
    }


def called_at() -> Site:
    """Where the operation at hand is called: the innermost frame that does not pass it on."""
    frame: Any = sys._getframe(1)
    while _passes_on(frame.f_code.co_filename) and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code, frame.f_lasti


def _passes_on(file: str) -> bool:
    found = _inside.get(file)
    if found is None:
        found = _inside[file] = os.path.abspath(file).startswith(_PASS_ON) or file.endswith("/contextlib.py")
    return found


RECORDER = Recorder()
