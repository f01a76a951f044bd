"""Profiles of a pipeline on a clock that is moved by hand, and of ranks whose clocks are apart."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.comm import recorder
from hpcmp.comm.mesh import Mesh
from hpcmp.comm.recorder import RECORDER, Flight
from hpcmp.cursor import Cursor, Place
from hpcmp.module import Module, Sequential
from hpcmp.parallel.pipeline import Microbatch, Pipeline
from hpcmp.parallel.schedules import SCHEDULES, simulate
from hpcmp.training import profile as profiles
from hpcmp.training.phases import Phases
from hpcmp.training.profile import Profile
from hpcmp.wgrad import WGrad

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


from tests.training.test_profile import problems


class Clock:
    """Seconds, which only work and messages move."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Work(Module):
    """Takes a second forward, one backward, and one for its weights."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def forward(self, x: Any) -> tuple[Any, Any]:
        self.clock.now += 1
        return x, None

    def backward(self, dy: Any, saved: Any, wgrad: WGrad) -> Any:
        self.clock.now += 1
        wgrad(self.backward_weight)
        return dy

    def backward_weight(self) -> None:
        self.clock.now += 1


class Loss(Module):
    """No work at all."""

    def forward(self, x: Any) -> tuple[Any, Any]:
        return 0.0, x[0]

    def backward(self, dy: Any, saved: Any, wgrad: WGrad) -> Any:
        return saved, None


class Arrival:
    """The time at which a message was sent: nobody has it before."""

    def __init__(self, clock: Clock, request: Any, sent: np.ndarray[Any, Any]) -> None:
        self.clock, self.request, self.sent = clock, request, sent

    def Wait(self) -> None:
        self.request.Wait()
        self.clock.now = max(self.clock.now, float(self.sent[0]))

    def Test(self) -> bool:
        return bool(self.request.Test())


def on_the_clock(mesh: Mesh, world: Intracomm, clock: Clock) -> None:
    """Have messages between stages take no time, and be known no earlier than they are sent."""
    from hpcmp.comm.mpi import MpiCommunicator

    class Virtual(MpiCommunicator):
        def _send(self, x: Any, peer: int, tag: int) -> Any:
            pending, now = super()._send(x, peer, tag), np.array([clock.now])
            pending.requests.append(times.Isend(now, peer, tag))
            pending.keep = (*pending.keep, now)
            return pending

        def close(self) -> None:
            super().close()
            times.Free()

        def _recv(self, shape: Any, dtype: Any, peer: int, tag: int, like: Any) -> Any:
            pending, sent = super()._recv(shape, dtype, peer, tag, like), np.empty(1)
            pending.requests.append(Arrival(clock, times.Irecv(sent, peer, tag), sent))
            return pending

    if world.size > 1:
        times = world.Dup()
        made = Virtual(world.Dup())
        made.flight = Flight("pp", mesh.launched)
        mesh._groups[frozenset({"pp"})] = made


@pytest.mark.mpi
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_bubble_of_a_schedule(
    world: Intracomm, mpi_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """By a clock that work and messages alone move, every rank's bubble is what the simulator says; for 1F1B what the
    closed form does."""
    clock, m = Clock(), 2 * world.size
    schedule = SCHEDULES[name](2 if name == "interleaved" else 1)
    monkeypatch.setattr(recorder, "time", SimpleNamespace(monotonic=clock, time=lambda: 0.0))
    RECORDER.records.clear()  # by other clocks
    with Mesh(world, pp=world.size) as mesh:
        on_the_clock(mesh, world, clock)
        stages = [Sequential(work=Work(clock)) for _ in range(schedule.chunks)]
        pipeline = Pipeline(stages, Loss(), mesh["pp"], schedule, Cursor(0), lambda place: (1,), np.empty(0))
        batches = [Microbatch(np.ones(1), np.ones(1), Place(0, np.arange(1), 1)) for _ in range(m)]
        phases = Phases()
        engine: Any = SimpleNamespace(mesh=mesh, xp=np, phases=phases, pipeline=pipeline)

        def steps() -> Iterator[int]:
            for step in range(4):
                with phases("compute"):
                    pipeline.step(batches, 1.0)
                    with mesh.flight.blocking("sum"):  # the ranks end a step together
                        clock.now = max(world.allgather(clock.now))
                yield step

        profile = Profile(engine, mpi_tmp_path, 1, 0, 4, clock)
        assert list(profile.over(steps())) == [0, 1, 2, 3]
        assert profile.summary is not None and profile.summary["problems"] == []
        wanted = simulate(schedule, world.size, m, (1, 1, 1))
        busy = 3.0 * m * schedule.chunks
        for rank in profile.summary["ranks"]:
            assert rank["step"] == wanted.time and rank["compute"] == busy
            assert rank["bubble"] == wanted.time - busy and rank["exposed"] == rank["other"] == 0
            if name == "1f1b":
                assert rank["bubble"] / rank["step"] == pytest.approx((world.size - 1) / (m + world.size - 1))
        if world.rank == 0 and world.size > 1:
            planted(json.loads((mpi_tmp_path / "profile" / "trace.json").read_text()), world.size)


@pytest.mark.mpi(min_size=2)
def test_clocks_of_hosts(world: Intracomm, mpi_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks that are a quarter of an hour apart make a sound trace; where they are not set, that is noticed."""
    monkeypatch.setenv("HPCMP_NODES", ",".join(map(str, range(world.size))))

    def clock() -> float:
        return time.monotonic() + 1000 * world.rank

    monkeypatch.setattr(recorder, "time", SimpleNamespace(monotonic=clock, time=time.time))
    RECORDER.records.clear()  # by other clocks
    with Mesh(world, dp=world.size) as mesh:
        pipeline = Pipeline([], Loss(), mesh["pp"], SCHEDULES["1f1b"](1), Cursor(0), lambda place: (1,), np.empty(0))
        engine: Any = SimpleNamespace(mesh=mesh, xp=np, phases=Phases(), pipeline=pipeline)

        def steps() -> Iterator[int]:
            for step in range(3):
                mesh["dp"].all_reduce(np.ones(3)).wait()
                yield step

        for set_right in (True, False):
            if not set_right:
                monkeypatch.setattr(profiles, "ahead", lambda *given: {})
            profile = Profile(engine, mpi_tmp_path, 2, 0, 3, clock)
            assert list(profile.over(steps())) == [0, 1, 2]
            assert profile.summary is not None and (profile.summary["clock_error"] > 0) == set_right
            assert set_right or world.rank or profile.summary["problems"]
            assert not set_right or not profile.summary["problems"]
            world.Barrier()


def planted(trace: dict[str, Any], ranks: int) -> None:
    """Each error is found that is put into a sound trace."""
    assert problems(trace) == []
    for shift in (-1e6, 1e6):  # a second, on one rank
        moved = [
            e | {"ts": e["ts"] + shift} if e["pid"] == ranks - 1 and "ts" in e else e for e in trace["traceEvents"]
        ]
        assert problems({"traceEvents": moved}) != []
        assert problems({"traceEvents": moved}, error=0.6) == []  # no more is known of its clock
    left = [e for e in trace["traceEvents"] if e["ph"] != "e"]
    assert any("left open" in each for each in problems({"traceEvents": left}))
