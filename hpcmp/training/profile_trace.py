"""The trace of a profile in the Trace Event Format, which chrome://tracing and Perfetto read, and what is wrong in one.

A process a rank. Its thread 0 has the ranges of the host, thread 1 those of its GPU; a communication is an asynchronous
event from its start to its end. Times are in microseconds since rank 0 began the first step, on rank 0's clock.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .profile_ranges import Range
from .profile_summary import Operation

HOST, DEVICE = 0, 1
_GRAIN = 2e-3  # microseconds: two units of the last decimal
#: Of these no rank can have the result before every rank has come to it.
_JOINT = ("all_reduce", "all_reduce max", "gather_objects")

Event = dict[str, Any]


def events(
    rank: int, ranges: Iterable[Range], found: Sequence[Operation], zero: float, thread: int = HOST
) -> Iterator[Event]:
    """The events of ranges and operations of a rank, whose clock was at ``zero`` when rank 0 began the first step."""

    def at(seconds: float) -> float:
        return round((seconds - zero) * 1e6, 3)

    for each in ranges:
        event = {"name": each.title, "cat": each.kind, "pid": rank, "tid": thread, "ts": at(each.start)}
        if each.end is None:
            yield event | {"ph": "B"}
        else:
            dur = round(at(each.end) - at(each.start), 3)
            yield event | {"ph": "X", "dur": dur, "args": each.about}
    for number, talk in enumerate(found):
        about: Event = {"operation": talk.name, "axes": talk.axes, "ranks": list(talk.ranks), "bytes": talk.bytes}
        about["waited"] = round(talk.wait * 1e6, 3)
        about |= {"sequence": talk.sequence} if talk.tag is None else {"peer": talk.peer, "tag": talk.tag}
        event = {"name": f"{talk.name} {talk.axes}", "cat": "communication", "id": f"{rank}.{number}", "pid": rank}
        event["tid"] = thread
        yield event | {"ph": "b", "ts": at(talk.start), "args": about}
        yield event | {"ph": "e", "ts": at(talk.end)}


def named(rank: int, place: str, host: str, device: bool) -> Iterator[Event]:
    """The events that name a rank and its threads."""
    about = {"process_name": {"name": f"rank {rank} ({place}) on {host}"}, "process_sort_index": {"sort_index": rank}}
    for name, args in about.items():
        yield {"ph": "M", "name": name, "pid": rank, "tid": HOST, "args": args}
    for thread, name in ((HOST, "host"), (DEVICE, "GPU"))[: 1 + device]:
        yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": thread, "args": {"name": name}}


def text(some: Iterable[Event]) -> str:
    """Events as they stand in a trace, a line each, with commas between."""
    return ",\n".join(json.dumps(event, separators=(",", ":")) for event in some)


class Check:
    """What is wrong in a trace, whose events are given rank by rank. error: how far a rank's clock may be off, in
    seconds.

    An event that is left open, that lies in no step, or that overlaps another of its thread without lying in it; and
    where the ranks' clocks contradict each other: a message that is there before it is sent, or a sum before a rank
    has come to it.
    """

    def __init__(self, error: float = 0.0) -> None:
        self.grain = _GRAIN + 2 * error * 1e6
        self.found: list[str] = []
        self.sums: dict[Any, list[tuple[float, float, int, str]]] = defaultdict(list)
        self.sent: dict[Any, list[float]] = defaultdict(list)
        self.received: dict[Any, list[tuple[float, int]]] = defaultdict(list)

    def add(self, rank: int, some: Sequence[Event]) -> None:
        """The events of a rank."""
        began = min((event["ts"] for event in some if event["ph"] == "X" and event["cat"] == "step"), default=0.0)
        threads: dict[int, list[Event]] = defaultdict(list)
        begun: dict[str, Event] = {}
        for event in some:
            if event["ph"] == "X":
                threads[event["tid"]].append(event)
            elif event["ph"] == "B":
                self.found.append(f"rank {rank}: {event['name']} at {event['ts']:.0f} us is left open")
            elif event["ph"] == "b":
                begun[event["id"]] = event
            elif event["ph"] == "e" and (start := begun.pop(event["id"]))["ts"] >= began:  # its like are all there
                self._operation(rank, start, event["ts"])
        for event in begun.values():
            self.found.append(f"rank {rank}: {event['name']} at {event['ts']:.0f} us is left open")
        for each in threads.values():
            self._nesting(rank, each)

    def problems(self) -> list[str]:
        """All that is wrong, a line each."""
        found = list(self.found)
        for each in self.sums.values():
            start, _, late, name = max(each, key=lambda one: one[0])
            _, end, early, _ = min(each, key=lambda one: one[1])
            if end < start - self.grain:
                found.append(f"{name}: over on rank {early} {start - end:.0f} us before rank {late} has come to it")
        for key, ends in self.received.items():
            for number, ((end, rank), start) in enumerate(zip(ends, self.sent.get(key, []), strict=False)):
                if end < start - self.grain:
                    axes, _, source, _, tag = key
                    found.append(
                        f"recv {axes}: message {number} of tag {tag} is on rank {rank} {start - end:.0f} us before "
                        f"rank {source} of the group sends it"
                    )
        return found

    def _nesting(self, rank: int, some: list[Event]) -> None:
        around: list[Event] = []
        for event in sorted(some, key=lambda e: (e["ts"], -e["dur"])):
            while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"] + _GRAIN:
                if event["dur"] <= _GRAIN and around[-1]["ts"] + around[-1]["dur"] >= event["ts"]:
                    break  # nothing, at the end of what it lies in
                around.pop()
            where = f"rank {rank}: {event['name']} at {event['ts']:.0f} us"
            if not around and event["cat"] != "step":
                self.found.append(f"{where} lies in no step")
            if around and event["ts"] + event["dur"] > around[-1]["ts"] + around[-1]["dur"] + _GRAIN:
                self.found.append(f"{where} ends after {around[-1]['name']}, in which it began")
            around.append(event)

    def _operation(self, rank: int, event: Event, end: float) -> None:
        about = event["args"]
        name, axes, group, where = about["operation"], about["axes"], tuple(about["ranks"]), event["name"]
        if name in _JOINT and (about["bytes"] or name == "gather_objects"):
            self.sums[name, axes, group, about["sequence"]].append((event["ts"], end, rank, where))
        elif name in ("send", "recv"):
            me, peer = group.index(rank), about["peer"]
            if name == "send":
                self.sent[axes, group, me, peer, about["tag"]].append(event["ts"])
            else:
                self.received[axes, group, peer, me, about["tag"]].append((end, rank))
