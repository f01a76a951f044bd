"""A profile on a GPU: its ranges and communications by events on the streams, read when the steps are done.

The host only queues a GPU's work: when that ran, and what it waited for, events on its streams tell. None is waited
for while steps are profiled. Never run on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

from ..comm.base import Timed
from ..comm.recorder import Record
from .profile_ranges import Range, timed
from .profile_summary import Operation, Window


class Device:
    """The clock of a GPU of ``xp``, set by the host's ``clock``. Until ``close``, ``kept`` keeps NCCL's operations,
    each with its record. Waits once, now, for what is queued."""

    def __init__(self, xp: ModuleType, clock: Callable[[], float] = time.monotonic) -> None:
        self.xp = xp
        self.base = timed(xp)
        self.base.synchronize()
        self.zero = clock()
        self.kept: list[tuple[Record, Any]] = []
        Timed.kept = self.kept

    def at(self, event: Any) -> float:
        """When an event was, in seconds of the host's clock. Waits until it is."""
        event.synchronize()
        return self.zero + float(self.xp.cuda.get_elapsed_time(self.base, event)) / 1e3

    def ranges(self, some: Iterable[Range]) -> list[Range]:
        """``some`` as the GPU ran them; what is open has no end here either."""
        found = []
        for each in some:
            times = [self.at(event) for event in each.device]
            found.append(Range(each.kind, each.name, times[0], times[1] if len(times) > 1 else None, **each.about))
        return found

    def operations(self, window: Window, launched: Sequence[int]) -> list[Operation]:
        """NCCL's: when each had its stream to itself, and since when the stream of the computation waited for it.
        ``launched``: of each rank of the mesh its number in MPI's world."""
        numbers = {world: rank for rank, world in enumerate(launched)}
        found = []
        for record, done in self.kept:
            start, end = self.at(done.began), self.at(done.event)
            since = [self.at(event) for event in done.waits[:1]]
            waits = since[0] if since and since[0] < end else None
            size = 0 if record.count is None else record.count * int(record.dtype.itemsize)
            ranks = tuple(numbers.get(world, -1) for world in record.flight.ranks)
            key = record.flight.axes, ranks, record.operation, size, record.sequence, record.peer, record.tag
            if end > window[0]:
                found.append(Operation(*key, start, waits, end))
        return found

    def close(self) -> None:
        """Keep no more."""
        Timed.kept = None
