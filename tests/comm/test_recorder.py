"""The flight recorder: what is recorded of every operation, and of which one a process waits too long."""

from __future__ import annotations

import inspect
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp import partition
from hpcmp.checkpoint import agree
from hpcmp.collectives import AllReduce
from hpcmp.comm import recorder
from hpcmp.comm.base import Pending
from hpcmp.comm.mesh import Mesh
from hpcmp.comm.recorder import Flight, Recorder
from hpcmp.comm.topology import Topology

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """A recorder of the test's own."""
    monkeypatch.setattr(recorder, "RECORDER", made := Recorder(16))
    return made


def here() -> str:
    """``file:line`` of the line that calls this, as a record's site is written."""
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    return f"{Path(__file__)}:{frame.f_back.f_lineno}"


def test_what_a_record_holds(fresh: Recorder) -> None:
    flight = Flight("dp", [4, 6])
    before = time.time()
    record, site = flight.begin("broadcast", np.dtype(np.float32), 12, 1), here()
    message = flight.begin("recv", np.float64, 3, 0, 7)
    told = fresh.snapshot()
    json.dumps(told)
    assert told["groups"] == [{"axes": "dp", "ranks": (4, 6), "number": 1, "begun": 1}]
    first, second = told["records"]
    assert before - 0.1 < first.pop("start") < time.time() + 0.1
    assert first == {
        **{"group": 0, "sequence": 1, "operation": "broadcast", "dtype": "float32", "count": 12, "peer": 1},
        **{"tag": None, "site": site, "state": "started", "waits": None, "end": None},
    }
    assert (second["sequence"], second["dtype"], second["peer"], second["tag"]) == (None, "float64", 0, 7)
    message.finish()
    record.block()
    assert [r["state"] for r in fresh.snapshot()["records"]] == ["started", "finished"]
    assert [r["waits"] is None for r in fresh.snapshot()["records"]] == [False, True]
    record.leave()
    assert [r["end"] is None for r in fresh.snapshot()["records"]] == [False, False] and not fresh.blocked


def test_the_last_operations_are_kept_and_the_one_that_is_waited_for(fresh: Recorder) -> None:
    flight = Flight("tp", [0, 1])
    first = flight.begin("all_reduce")
    first.block()
    for _ in range(20):
        flight.begin("all_gather").finish()
    told = fresh.snapshot()
    assert [r["sequence"] for r in told["records"]] == [1, *range(6, 22)]
    assert told["groups"][0]["begun"] == 21
    flight.close()
    assert fresh.snapshot()["groups"] == told["groups"]  # its records are there still


def test_only_what_the_process_waits_in_is_overdue(fresh: Recorder) -> None:
    flight = Flight("dp", [0, 1])
    started, waited = flight.begin("all_gather"), flight.begin("all_reduce")
    waited.block()
    time.sleep(0.02)
    assert fresh.overdue(0.01) is waited and fresh.overdue(60) is None
    waited.leave()
    assert fresh.overdue(0.01) is None and started.end is None


def test_what_runs_on_a_gpu_is_overdue_until_its_event_has_come(fresh: Recorder) -> None:
    class Event:
        done = False

        def Test(self) -> bool:
            return self.done

    record = Flight("dp", [0, 1]).begin("all_reduce")
    record.event = event = Event()
    record.block()
    record.leave()  # the host has queued what comes after
    time.sleep(0.02)
    assert fresh.overdue(0.01) is record and fresh.snapshot()["records"][0]["waits"] is not None
    event.done = True
    assert fresh.overdue(0.01) is None and record.end is not None


def test_a_wait_that_fails_does_not_end_the_operation(fresh: Recorder) -> None:
    def fail(_: Any) -> Any:
        raise ValueError("planted")

    pending = Pending(np.ones(1), (), fail)
    pending.record = record = Flight("dp", [0, 1]).begin("all_reduce")
    with pytest.raises(ValueError, match="planted"):
        pending.wait()
    assert record.end is None and not fresh.blocked
    assert [r["state"] for r in fresh.snapshot()["records"]] == ["failed"]


def test_communicators_of_the_same_ranks_are_told_apart(fresh: Recorder) -> None:
    assert [Flight("dp", [0, 1]).number, Flight("dp", [0, 1]).number, Flight("dp", [2, 3]).number] == [1, 2, 1]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("choice", [{}, {"shared_memory": "yes"}, {"hierarchical": "yes"}])
def test_every_operation_of_a_mesh(world: Intracomm, fresh: Recorder, choice: dict[str, Any]) -> None:
    n = world.size
    topology = Topology(tuple(rank * 2 // n for rank in range(n)))
    with Mesh(world, dp=n, topology=topology, **choice) as mesh:
        dp, x, rows = mesh["dp"], np.ones((n, 2), np.float32), partition.sizes(2 * n, n)
        after, before = (dp.rank + 1) % n, (dp.rank - 1) % n
        calls = [
            lambda: [dp.all_reduce(x), dp.all_reduce(x, "max")],
            lambda: [dp.all_gather(x, 1), dp.reduce_scatter(x), dp.all_to_all(x, 0, 1)],
            lambda: [dp.all_gather_v(x, [n] * n), dp.broadcast(x, n - 1)],
            lambda: [dp.send(x, after, 5), dp.recv((n, 2), x.dtype, before, 5, like=x)],
        ]
        for call in calls:
            for pending in call():
                pending.wait()
        assert rows and [(r["operation"], r["sequence"], r["count"], r["peer"]) for r in told(fresh, "dp")] == [
            ("the making", 0, None, None),
            ("all_reduce", 1, 2 * n, None),
            ("all_reduce max", 2, 2 * n, None),
            ("all_gather", 3, 2 * n * n, None),
            ("reduce_scatter", 4, 2 * n, None),
            ("all_to_all", 5, 2 * n, None),
            ("all_gather", 6, 2 * n * n, None),
            ("broadcast", 7, 2 * n, n - 1),
            ("send", None, 2 * n, after),
            ("recv", None, 2 * n, before),
        ]
        assert all(r["state"] == "finished" and r["end"] >= r["start"] for r in told(fresh, "dp"))
        assert all(r["site"].startswith(f"{Path(__file__)}:") for r in told(fresh, "dp"))
    assert not fresh.flights and not fresh.blocked


@pytest.mark.mpi(min_size=2)
def test_the_control_plane(world: Intracomm, fresh: Recorder) -> None:
    with Mesh(world, dp=world.size) as mesh:
        mesh.gather_objects(1), agree.broadcast(mesh, 2), agree.gather(mesh, 3), agree.scatter(mesh, [4] * world.size)
        names = ["gather_objects", "broadcast of an object", "gather of objects", "scatter of objects"]
        assert [r["operation"] for r in told(fresh, "all")] == names
        assert all(r["site"].startswith(f"{Path(__file__)}:") for r in told(fresh, "all"))


@pytest.mark.mpi(min_size=2)
def test_large_sums_in_phases_are_one_operation(world: Intracomm, fresh: Recorder) -> None:
    topology = Topology(tuple(rank * 2 // world.size for rank in range(world.size)))
    with Mesh(world, dp=world.size, topology=topology, hierarchical="yes") as mesh:
        mesh["dp"].all_reduce(np.ones(100, np.float16)).wait()
        assert [r["operation"] for r in told(fresh, "dp")] == ["the making", "all_reduce"]
        assert {g["axes"] for g in fresh.snapshot()["groups"]} == {"all", "dp"}


@pytest.mark.mpi(min_size=2)
def test_a_layer_s_call_stands_where_the_operator_is_called(world: Intracomm, fresh: Recorder) -> None:
    with Mesh(world, tp=world.size) as mesh:
        _, site = AllReduce(mesh["tp"])(np.ones(1)), here()
        assert told(fresh, "tp")[-1]["site"] == site


def told(fresh: Recorder, axes: str) -> list[dict[str, Any]]:
    """The records of one group."""
    found = fresh.snapshot()
    return [record for record in found["records"] if found["groups"][record["group"]]["axes"] == axes]
