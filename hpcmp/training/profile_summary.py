"""Where the time of profiled steps went: every instant of a step belongs to exactly one of ``SHARES``.

An instant belongs to the innermost range that it lies in: a wait for communication is exposed communication, or a
bubble; anything else is of the phase around it, where an action or a layer without one is compute (an evaluation's).
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..comm.recorder import Record
from ..plain import read_whole
from .profile_ranges import Range

#: The parts of a step; they add up to it.
SHARES = ("compute", "exposed", "bubble", "optimizer", "data", "checkpoint", "other")
#: What the summary has of each rank: a step, its parts, and the time in which any communication ran, hidden or not.
COLUMNS = ("step", *SHARES, "communication")

FOLDER, SUMMARY = "profile", "summary.json"
_LARGEST = 1 << 26  # bytes of a summary

Window = tuple[float, float]


class Operation(NamedTuple):
    """A communication: when it began, since when this rank waited for it (None: it never did), when it was there."""

    axes: str
    ranks: tuple[int, ...]
    name: str
    bytes: int
    sequence: int | None
    peer: int | None
    tag: int | None
    start: float
    waits: float | None
    end: float

    @property
    def wait(self) -> float:
        """Seconds in which this rank was blocked."""
        return 0.0 if self.waits is None else self.end - self.waits


def operations(records: Iterable[Record], window: Window, launched: Sequence[int]) -> list[Operation]:
    """What of the recorder's records ran in ``window``, cut off at its end, as waits are at its start. launched: of
    each rank of the mesh its number in MPI's world, by which records name ranks."""
    numbers = {world: rank for rank, world in enumerate(launched)}
    begin, end = window
    found = []
    for r in records:
        if r.start < end and (r.end is None or r.end > begin) and not r.failed:
            size = 0 if r.count is None or r.dtype is None else r.count * int(r.dtype.itemsize)
            there = end if r.end is None else min(r.end, end)
            since = None if r.waits is None or r.waits >= there else max(r.waits, begin)
            ranks = tuple(numbers.get(world, -1) for world in r.flight.ranks)
            key = r.flight.axes, ranks, r.operation, size, r.sequence, r.peer, r.tag
            found.append(Operation(*key, r.start, since, there))
    return found


def waits(found: Iterable[Operation]) -> list[Range]:
    """The ranges in which this rank was blocked."""
    return [
        Range("wait", f"{each.name} {each.axes}", each.waits, each.end, bytes=each.bytes)
        for each in found
        if each.waits is not None
    ]


def pipelines(ranges: Sequence[Range]) -> list[Window | None]:
    """Of each step, from its first action to its last, without those of an evaluation; None where there are none."""
    computing = [each for each in ranges if each.kind == "phase" and each.name == "compute"]
    found: list[Window | None] = []
    for step in (each for each in ranges if each.kind == "step"):
        within = [each for each in computing if inside(each, step)]
        ran = [each for each in ranges if each.kind == "action" and any(inside(each, phase) for phase in within)]
        found.append((ran[0].start, max(each.until for each in ran)) if ran else None)
    return found


def inside(inner: Range, outer: Range) -> bool:
    """Whether ``inner`` lies in ``outer``."""
    return outer.start <= inner.start and inner.until <= outer.until


def bubbles(ranges: Sequence[Range], windows: Sequence[Window]) -> list[Range]:
    """``ranges`` with those waits, or parts of waits, that are bubbles told from the others.

    windows: the times from the first action of any stage of this rank's pipeline to the last action of any. Whatever
    this rank waits for meanwhile, outside of its own actions, it waits since other stages are not done.
    """
    actions = sorted((each for each in ranges if each.kind == "action"), key=lambda each: each.start)
    starts = [each.start for each in actions]
    found = []
    for each in ranges:
        at = bisect_right(starts, each.start) - 1
        if each.kind != "wait" or (at >= 0 and inside(each, actions[at]) and each.start < actions[at].until):
            found.append(each)
            continue
        cuts = sorted({each.start, each.until, *(t for w in windows for t in w if each.start < t < each.until)})
        for begin, end in zip(cuts, cuts[1:], strict=False):
            idle = any(w[0] <= begin and end <= w[1] for w in windows)
            found.append(Range("bubble" if idle else "wait", each.name, begin, end, **each.about))
    return found


def nested(ranges: Iterable[Range]) -> list[tuple[Range, Range | None]]:
    """Each range and the innermost one around it, in the order of their starts, the outer first."""
    found: list[tuple[Range, Range | None]] = []
    around: list[Range] = []
    for each in sorted(ranges, key=lambda each: (each.start, -each.until)):
        while around and around[-1].until <= each.start:
            around.pop()
        found.append((each, around[-1] if around else None))
        around.append(each)
    return found


class Own(NamedTuple):
    """What a rank spent in its ranges themselves, without what lies in them: seconds of each of ``SHARES``, and of each
    (layer, direction), with the number of calls."""

    shares: dict[str, float]
    layers: dict[tuple[str, str], tuple[float, int]]


def own(ranges: Iterable[Range]) -> Own:
    """Of the steps among ``ranges``, which are closed, and what lies in them."""
    seconds: dict[int, float] = defaultdict(float)
    share: dict[int, str] = {}
    shares = dict.fromkeys(SHARES, 0.0)
    layers: dict[tuple[str, str], tuple[float, int]] = {}
    order = nested(ranges)
    for each, outer in order:
        seconds[id(each)] += each.seconds
        if outer is not None:
            seconds[id(outer)] -= each.seconds
        if each.kind == "step" or outer is not None:
            share[id(each)] = _share(each, share.get(id(outer), ""))
    for each, _ in order:
        if name := share.get(id(each)):
            shares[name] += seconds[id(each)]
            if each.kind == "layer":
                key = each.name, str(each.about["direction"])
                before, calls = layers.get(key, (0.0, 0))
                layers[key] = before + seconds[id(each)], calls + 1
    return Own(shares, layers)


def _share(each: Range, outer: str) -> str:
    """Of which part of the step it is, within a range that is of ``outer``; "" outside of steps."""
    if each.kind == "step":
        return "other"
    if not outer:
        return ""
    if each.kind in ("wait", "bubble"):
        return "exposed" if each.kind == "wait" else "bubble"
    if each.kind == "phase":
        return each.name
    return "compute" if outer == "other" else outer


def columns(ranges: Sequence[Range], found: Sequence[Operation]) -> list[float]:
    """``COLUMNS`` of this rank: seconds a step."""
    steps = [each for each in ranges if each.kind == "step"]
    shares = own(ranges).shares
    running = union((each.start, each.end) for each in found)
    hidden = sum(max(0.0, min(b, s.until) - max(a, s.start)) for a, b in running for s in steps)
    values = [sum(each.seconds for each in steps), *shares.values(), hidden]
    return [value / max(1, len(steps)) for value in values]


def union(windows: Iterable[Window]) -> list[Window]:
    """The same times in windows that do not overlap."""
    found: list[Window] = []
    for begin, end in sorted(windows):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def longest_layers(ranges: Sequence[Range], rank: int, most: int) -> list[dict[str, Any]]:
    """The layers in which this rank spends the most time a step itself, without waits."""
    steps = max(1, sum(each.kind == "step" for each in ranges))
    each = own(ranges).layers.items()
    rows: list[dict[str, Any]] = [
        {"layer": name, "direction": direction, "seconds": seconds / steps, "calls": calls / steps, "rank": rank}
        for (name, direction), (seconds, calls) in each
    ]
    return sorted(rows, key=lambda row: -row["seconds"])[:most]


def largest(found: Sequence[Operation], steps: int, rank: int, most: int) -> list[dict[str, Any]]:
    """The communications of this rank by axes and operation that take the most time a step."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for each in found:
        empty = {"seconds": 0.0, "exposed": 0.0, "bytes": 0.0, "calls": 0.0, "rank": rank}
        row = rows.setdefault((each.axes, each.name), {"axes": each.axes, "operation": each.name, **empty})
        one = {"seconds": each.end - each.start, "exposed": each.wait, "bytes": each.bytes, "calls": 1}
        for key, value in one.items():
            row[key] += value / max(1, steps)
    return sorted(rows.values(), key=lambda row: -row["seconds"])[:most]


def read_summary(directory: Path) -> dict[str, Any] | None:
    """The summary of the profile in a run's directory; None if there is none, or it is none."""
    try:
        found = json.loads(read_whole(directory / FOLDER / SUMMARY, _LARGEST))
        made = {
            **{key: str(found[key]) for key in ("trace", "on")},
            **{key: int(found[key]) for key in ("first", "steps")},
            **{key: float(found[key]) for key in ("seconds", "clock_error")},
            "problems": [str(each) for each in found["problems"]],
            "ranks": [{name: float(rank[name]) for name in COLUMNS} for rank in found["ranks"]],
            "layers": [_row(row, "layer", "direction", "seconds", "calls") for row in found["layers"]],
            "communication": [
                _row(row, "axes", "operation", "seconds", "exposed", "bytes", "calls") for row in found["communication"]
            ],
        }
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return made if made["ranks"] else None


def _row(row: dict[str, Any], first: str, second: str, *numbers: str) -> dict[str, Any]:
    words = {first: str(row[first]), second: str(row[second])}
    return {**words, **{name: float(row[name]) for name in numbers}, "rank": int(row["rank"])}
