"""Ranges: what a profile says of them, what it notices, and how those of a GPU that is a stand-in are timed."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hpcmp.comm.recorder import Flight
from hpcmp.training.profile_ranges import Range, Ranges
from hpcmp.training.profile_summary import COLUMNS, Operation, bubbles, columns, largest, own, waits
from hpcmp.training.profile_trace import Check, events


def test_what_is_open_or_out_of_place_is_noticed() -> None:
    step = Range("step", "step 0", 0.0, 10.0)
    action = Range("action", "F0", 2.0, 6.0)
    for each, said in (
        (Range("layer", "head", 3.0), "head at 3000000 us is left open"),
        (Range("layer", "head", 3.0, 7.0), "head at 3000000 us ends after F0, in which it began"),
        (Range("layer", "head", 11.0, 12.0), "head at 11000000 us lies in no step"),
    ):
        check = Check()
        check.add(0, list(events(0, [step, action, each], [], 0.0)))
        assert check.problems() == [f"rank 0: {said}"]
    check = Check()
    check.add(0, list(events(0, [step, action, Range("layer", "head", 3.0, 6.0)], [], 0.0)))
    assert check.problems() == []


def tree(kinds: list[str], start: int, end: int, draw: random.Random) -> list[Range]:
    """Ranges in one another in whole seconds, some of no length."""
    found, at = [], start
    while kinds and at < end:
        begin = draw.randint(at, end)
        at = draw.randint(begin, end)
        kind: Any = draw.choice(kinds)
        name = draw.choice(["data", "compute", "optimizer"]) if kind == "phase" else "some"
        found.append(Range(kind, name, float(begin), float(at), direction="forward"))
        inner = {"phase": ["action", "layer", "wait"], "action": ["layer", "wait"], "layer": ["layer", "wait"]}
        found += tree(inner.get(kind, []), begin, at, draw)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_parts_add_up_to_the_step(seed: int) -> None:
    draw = random.Random(seed)
    ranges = []
    for step in range(3):
        ranges.append(Range("step", f"step {step}", 100.0 * step, 100.0 * step + 90))
        ranges += tree(["phase", "action", "layer", "wait"], 100 * step, 100 * step + 90, draw)
    split = bubbles(ranges, [(100.0 * step + 20, 100.0 * step + 70) for step in range(3)])
    found = own(split)
    assert sum(found.shares.values()) == 270 and all(value >= 0 for value in found.shares.values())
    waited = sum(each.seconds for each in ranges if each.kind == "wait")
    assert found.shares["exposed"] + found.shares["bubble"] == waited
    assert sum(seconds for seconds, _ in found.layers.values()) <= 270 - waited
    assert own(ranges).shares["bubble"] == 0


def test_communication_exposed_and_hidden() -> None:
    """A wait within an action is exposed though other stages run; one between actions is a bubble; the end of a wait
    beyond the last action of any stage is exposed."""
    ranges = [
        Range("step", "step 0", 0.0, 20.0),
        Range("phase", "compute", 0.0, 18.0),
        Range("action", "F0", 2.0, 8.0),
        Range("layer", "up", 3.0, 7.0, direction="forward"),
    ]
    shared: Any = {"ranks": (0, 1), "bytes": 100, "sequence": 1, "peer": None, "tag": None}
    talk = [
        Operation("pp", name="recv", start=0.0, waits=0.5, end=2.0, **shared),
        Operation("tp", name="all_reduce", start=4.0, waits=6.0, end=7.0, **shared),
        Operation("dp", name="all_reduce", start=5.0, waits=8.0, end=16.0, **shared),
        Operation("dp", name="all_gather", start=17.0, waits=None, end=19.0, **shared),
    ]
    told = dict(zip(COLUMNS, columns(bubbles([*ranges, *waits(talk)], [(0.0, 12.0)]), talk), strict=True))
    assert told == {
        "step": 20,
        "compute": 0.5 + 5 + 2,
        "exposed": 1 + 4,
        "bubble": 1.5 + 4,
        "optimizer": 0,
        "data": 0,
        "checkpoint": 0,
        "other": 2,
        "communication": 2 + 12 + 2,
    }
    row = largest(talk, 1, 0, 8)[0]
    assert (row["axes"], row["operation"], row["seconds"], row["exposed"]) == ("dp", "all_reduce", 11, 8)
    layer = own([*ranges, *waits(talk)]).layers["up", "forward"]
    assert layer == (3, 1)


class Gpu:
    """The part of CuPy that a profile uses, over a stream whose time is moved by hand. NVTX's ranges: ``told``."""

    def __init__(self) -> None:
        self.now = 100.0  # its own clock, in seconds
        self.told: list[str] = []
        gpu = self

        class Event:
            def __init__(self, disable_timing: bool = False) -> None:
                self.timed, self.at = not disable_timing, math.nan

            def record(self, stream: Any = None) -> None:
                self.at = gpu.now if stream is None else stream.now

            def synchronize(self) -> None:
                assert not math.isnan(self.at)

        def elapsed(start: Any, end: Any) -> float:
            assert start.timed and end.timed
            return 1e3 * (float(end.at) - float(start.at))

        nvtx = SimpleNamespace(RangePush=self.told.append, RangePop=lambda: self.told.append("pop"))
        self.cuda = SimpleNamespace(Event=Event, get_current_stream=lambda: self, get_elapsed_time=elapsed, nvtx=nvtx)

    def wait_event(self, event: Any) -> None:
        self.now = max(self.now, event.at)


def test_a_gpu_is_timed_by_its_events() -> None:
    """Ranges and waits as the GPU ran them, while the host only queues."""
    from hpcmp.comm.base import Timed
    from hpcmp.comm.lanes import Lane
    from hpcmp.training.profile_device import Device

    gpu = Gpu()
    xp: Any = gpu

    def host() -> float:
        return 7.0

    device, ranges = Device(xp, host), Ranges(xp, clock=host)
    stream = SimpleNamespace(now=0.0, ptr=0)  # NCCL's
    stream.wait_event = lambda event: setattr(stream, "now", max(stream.now, event.at))
    library: Any = SimpleNamespace(
        event=lambda timed=False: gpu.cuda.Event(not timed),
        current=lambda: gpu,
        nccl=SimpleNamespace(groupStart=lambda: None, groupEnd=lambda: None),
    )
    lane = object.__new__(Lane)  # without a connection
    lane.library, lane.stream = library, stream
    flight = Flight("dp", [4, 5])
    with ranges("step", "step 0"):
        with ranges("layer", "up", direction="forward"):
            gpu.now += 2
        record = flight.begin("all_reduce", np.dtype(np.float32), 10)
        pending = lane.start([(10, lambda ptr: setattr(stream, "now", stream.now + 5))], np.ones(10))
        assert Timed.kept is device.kept
        device.kept.append((record, pending.requests[0]))
        gpu.now += 1
        pending.wait()
        gpu.now += 3
    device.close()
    after = lane.start([], np.ones(10)).requests[0]
    assert after.began is None and not after.event.timed  # nothing is timed any more
    assert Timed.kept is None and gpu.told == ["step 0", "up forward", "pop", "pop"]
    found = device.operations((7.0, 18.0), [4, 5])
    key = "dp", (0, 1), "all_reduce", 40, record.sequence, None, None
    assert found == [Operation(*key, 9.0, 10.0, 14.0)]
    whole = [*device.ranges(ranges.kept), *waits(found)]
    assert [(each.start, each.end) for each in whole] == [(7.0, 17.0), (7.0, 9.0), (10.0, 14.0)]
    told = dict(zip(COLUMNS, columns(whole, found), strict=True))
    assert (told["step"], told["compute"], told["exposed"], told["communication"]) == (10, 2, 4, 5)
    flight.close()
