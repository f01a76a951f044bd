"""``hpcmp train --profile``: a few steps of a run with all that each rank does in them, as a trace and as a summary."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..comm.clocks import ahead
from ..comm.mesh import Mesh
from ..comm.recorder import RECORDER
from .engine import Engine
from .profile_device import Device
from .profile_ranges import Range, Ranges, installed
from .profile_summary import (
    COLUMNS,
    FOLDER,
    SUMMARY,
    Operation,
    bubbles,
    columns,
    largest,
    longest_layers,
    operations,
    pipelines,
    waits,
)
from .profile_trace import DEVICE, Check, events, named, text

log = logging.getLogger("hpcmp")
T = TypeVar("T")

TRACE = "trace.json"
SKIPPED = 2  # steps before the profiled ones, in which kernels are compiled and buffers made
MERGED = 64  # ranks in the trace, the first; the summary has all
_MOST = 8  # rows of a rank in the tables of layers and communications


class Clocks(NamedTuple):
    """By how much this rank's clock is ahead of rank 0's, and how far any rank's may be off, in seconds."""

    ahead: float
    error: float


class Profile:
    """Takes a profile of ``steps`` steps (0: none) of a run of ``engine`` in ``directory``, which has done ``done`` of
    its ``of`` steps.

        for result in profile.over(trainer):
            ...
        profile.summary

    The first two steps are not among them, where there are enough. ``summary`` is None until they are done; the files
    are ``directory/profile/trace.json`` and ``summary.json``. With HPCMP_NVTX=1 in the environment all steps on a GPU
    make NVTX ranges; without it, those that are profiled. clock: in seconds, which the recorder of communications
    must go by, too.
    """

    def __init__(
        self,
        engine: Engine,
        directory: Path,
        steps: int,
        done: int,
        of: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine, self.mesh, self.folder, self.clock = engine, engine.mesh, directory / FOLDER, clock
        self.steps = max(0, min(steps, of - done))
        self.skipped = min(SKIPPED, of - done - self.steps)
        self.first = done + self.skipped
        self.summary: dict[str, Any] | None = None

    @property
    def alone(self) -> range:
        """The steps that must not be begun while the one before is under way: so that each range has its whole step."""
        return range(self.first, self.first + self.steps + 1) if self.steps else range(0)

    def over(self, results: Iterable[T]) -> Iterator[T]:
        """``results`` of steps, each of which is taken when it is asked for. Collective over the mesh."""
        taken, xp = iter(results), self.engine.xp
        always = xp is not np and os.environ.get("HPCMP_NVTX") == "1"
        with installed(self.engine, Ranges(xp, keep=False)) if always else nullcontext():
            yield from islice(taken, self.skipped) if self.steps else taken
        if not self.steps:
            return
        device = None if xp is np else Device(xp, self.clock)
        ranges = Ranges(xp, clock=self.clock)
        RECORDER.keep(None)
        try:
            with installed(self.engine, ranges):
                for number in range(self.first, self.first + self.steps):
                    kept = len(ranges.kept)
                    with ranges("step", f"step {number}"):
                        result = next(taken, None)
                    if result is None:  # the run has ended early
                        del ranges.kept[kept:]
                        break
                    yield result
            self._finish(ranges.kept, device)
        finally:
            RECORDER.keep()
            if device is not None:
                device.close()
        with installed(self.engine, Ranges(xp, keep=False)) if always else nullcontext():
            yield from taken

    def _finish(self, ranges: list[Range], device: Device | None) -> None:
        """Make the summary and write the files."""
        steps = [each for each in ranges if each.kind == "step"]
        if not steps:
            return
        window = steps[0].start, steps[-1].until
        queued = {id(record) for record, _ in device.kept} if device else set()
        records = [record for record in list(RECORDER.records) if id(record) not in queued]
        found = operations(records, window, self.mesh.launched)
        clocks = self._clocks()
        zero = self.mesh.gather_objects(steps[0].start)[0] + clocks.ahead
        here, looked_at = self._told(ranges, found, clocks), found
        place = ", ".join(f"{axis} {at}" for axis, at in self.mesh.coordinates.items() if self._size(axis) > 1)
        some = [*named(self.mesh.rank, place or "alone", self._host(), device is not None)]
        some += events(self.mesh.rank, here, found, zero)
        if device is not None:
            looked_at = device.operations(window, self.mesh.launched)
            here = self._told(device.ranges(ranges), looked_at, clocks)
            some += events(self.mesh.rank, here, looked_at, zero, DEVICE)
        summary = self._summary(here, looked_at, len(steps))
        problems = self._write(text(some), clocks.error)
        self.summary = {
            "trace": str(self.folder / TRACE),
            "first": self.first,
            "steps": len(steps),
            "on": "device" if device is not None else "host",
            "clock_error": clocks.error,
            "problems": problems,
            **summary,
        }
        if self.mesh.rank == 0:
            self._put(SUMMARY, [json.dumps(self.summary)])

    def _told(self, ranges: list[Range], found: list[Operation], clocks: Clocks) -> list[Range]:
        """``ranges`` with the waits for ``found``, and the bubbles among these."""
        whole = [*ranges, *waits(found)]
        pp = self.mesh["pp"]
        if pp.size == 1:
            return whole
        windows = [(np.nan, np.nan) if each is None else each for each in pipelines(ranges)]
        every = np.asarray(pp.all_gather(np.array([windows]) - clocks.ahead).wait()) + clocks.ahead
        return bubbles(whole, [(float(each[:, 0].min()), float(each[:, 1].max())) for each in np.moveaxis(every, 1, 0)])

    def _clocks(self) -> Clocks:
        """Ranks of one host share its clock: the first of each answers for it. Collective over the mesh."""
        nodes = self.mesh.topology.nodes
        leaders = [nodes.index(node) for node in range(max(nodes) + 1)]
        found = ahead(self.mesh.comm, leaders[1:], self.clock) if self.mesh.comm is not None else {}
        found = self.mesh.gather_objects(found)[0]
        mine = found.get(leaders[nodes[self.mesh.rank]], (0.0, 0.0))
        return Clocks(mine[0], max((error for _, error in found.values()), default=0.0))

    def _summary(self, ranges: list[Range], found: list[Operation], steps: int) -> dict[str, Any]:
        """Of all ranks, the same on each."""
        rank = self.mesh.rank
        mine = columns(ranges, found)
        rows = longest_layers(ranges, rank, _MOST), largest(found, steps, rank, _MOST)
        told = self.mesh.gather_objects((mine, *rows))
        return {
            "seconds": sum(each[0][0] for each in told) / len(told),
            "ranks": [dict(zip(COLUMNS, each[0], strict=True)) for each in told],
            "layers": _longest((row for each in told for row in each[1]), "layer", "direction"),
            "communication": _longest((row for each in told for row in each[2]), "axes", "operation"),
        }

    def _write(self, mine: str, error: float) -> list[str]:
        """Rank 0 writes the trace of the first ranks, which send it theirs, and looks for what is wrong in it."""
        body = mine.encode()
        sizes = self.mesh.gather_objects(len(body))[:MERGED]
        comm, rank = self.mesh[Mesh.axes], self.mesh.rank
        if 0 < rank < len(sizes):
            comm.send(np.frombuffer(body, np.uint8), 0).wait()
        if rank:
            return []
        check = Check(error)

        def parts() -> Iterator[str]:
            yield '{"displayTimeUnit":"ms","traceEvents":[\n'
            for other, size in enumerate(sizes):
                like = np.empty(0, np.uint8)
                part = bytes(comm.recv((size,), np.uint8, other, like=like).wait()).decode() if other else mine
                check.add(other, json.loads(f"[{part}]"))
                yield (",\n" if other else "") + part
            yield "\n]}\n"

        self._put(TRACE, parts())
        problems = check.problems()
        for problem in problems[:_MOST]:
            log.warning("profile: %s", problem)
        return problems

    def _put(self, name: str, parts: Iterable[str]) -> None:
        """Write a file of the profile. What cannot be written is lost, and that is said; all of ``parts`` are made."""
        each, path = iter(parts), self.folder / name
        try:
            self.folder.mkdir(exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                for part in each:
                    file.write(part)
        except OSError as error:
            log.warning("cannot write %s: %s", path, error.strerror or error)
            for _ in each:  # the other ranks send theirs
                pass

    def _size(self, axis: str) -> int:
        return self.mesh.shape.get(axis, 1)

    def _host(self) -> str:
        topology = self.mesh.topology
        return topology.names[topology.nodes[self.mesh.rank]] if topology.names else socket.gethostname()


def _longest(rows: Iterable[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """Of rows with the same ``keys`` the one of the rank that takes longest; of these the longest, first."""
    most: dict[Any, dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in keys)
        if key not in most or row["seconds"] > most[key]["seconds"]:
            most[key] = row
    return sorted(most.values(), key=lambda row: -row["seconds"])[:_MOST]
