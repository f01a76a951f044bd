"""NcclCommunicator without a GPU, over the model of NCCL: what it computes, the order of its calls, and how it ends."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.comm import lanes
from hpcmp.comm.recorder import RECORDER
from hpcmp.parallel.schedules import SCHEDULES, Schedule, make_schedule
from hpcmp.training.diagnosis import diagnose
from tests.comm.cases import differences
from tests.comm.nccl_model import NcclError, model

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

    from hpcmp.comm.nccl import NcclCommunicator


@pytest.fixture
def comm(world: Intracomm) -> Iterator[NcclCommunicator]:
    from hpcmp.comm.mpi import MpiCommunicator
    from hpcmp.comm.nccl import NcclCommunicator

    made = NcclCommunicator(MpiCommunicator(world.Dup()), model(world))
    yield made
    made.close()


@pytest.mark.mpi
def test_equals_mpi(comm: NcclCommunicator) -> None:
    assert not differences(comm, comm.control, np)
    calls = {"allReduce", "broadcast", "allGather", "reduceScatter", "send", "recv"}
    assert calls <= set(comm.library.log)  # type: ignore[attr-defined]


@pytest.mark.mpi
def test_arrays_on_the_host_go_over_mpi(comm: NcclCommunicator) -> None:
    comm.library.device = False  # type: ignore[attr-defined]
    assert not differences(comm, comm.control, np)
    assert not comm.library.log and not comm._lanes  # type: ignore[attr-defined]


@pytest.mark.mpi
def test_order_of_streams(comm: NcclCommunicator) -> None:
    log, x = comm.library.log, np.ones(3)  # type: ignore[attr-defined]
    pending = comm.all_reduce(x)
    assert log == ["current records", "lane 0 waits", "allReduce", "lane 0 records"]
    pending.wait()
    assert log[4:] == ["current waits"]
    pending.wait()
    assert len(log) == 5


@pytest.mark.mpi
def test_buffers_live_until_they_are_waited_for(comm: NcclCommunicator) -> None:
    x = np.ones((3, 5)).T
    pending = comm.all_reduce(x)
    assert any(kept.shape == x.shape and kept is not x for kept in pending.keep)
    pending.wait()
    assert not pending.keep


@pytest.mark.mpi
def test_unknown_dtype(comm: NcclCommunicator) -> None:
    with pytest.raises(TypeError, match="int16"):
        comm.all_reduce(np.ones(3, np.int16))


@pytest.mark.mpi
def test_test_becomes_true(comm: NcclCommunicator) -> None:
    pending = comm.all_reduce(np.full(3, comm.rank))
    while not pending.test():
        pass
    np.testing.assert_array_equal(pending.wait(), sum(range(comm.size)))


@pytest.mark.mpi
def test_making_a_lane_blocks_in_the_operation_at_hand(comm: NcclCommunicator) -> None:
    """So that the watchdog sees a rank that does not come to it."""
    library, seen = comm.library, []
    make = library.nccl.NcclCommunicator

    def making(*args: Any) -> Any:
        seen.append([record.operation for record in RECORDER.blocked if record.flight is comm.flight])
        return make(*args)

    library.nccl.NcclCommunicator = making
    record = comm.all_reduce(np.ones(3)).record
    assert seen == [["all_reduce"]] and record is not None
    assert record not in RECORDER.blocked and record.waits is None and record.end is None


@pytest.mark.mpi
def test_errors_in_the_background_are_found(comm: NcclCommunicator) -> None:
    library: Any = comm.library
    assert lanes.failure() == ""
    comm.all_reduce(np.ones(3)).wait()
    assert lanes.failure() == ""
    for nothing in NcclError(7, "in progress"), KeyError(7):  # what CuPy 14.2 raises for a status that it does not know
        library.found[0] = nothing
        assert lanes.failure() == ""
    library.found[0] = KeyError(8)
    assert lanes.failure() == "NCCL of a group, collectives: status 8"
    library.found[0] = NcclError(6, "NCCL_ERROR_REMOTE_ERROR")
    assert lanes.failure() == "NCCL of a group, collectives: NCCL_ERROR_REMOTE_ERROR"


@pytest.mark.mpi
def test_abort_gives_up_all_lanes_at_once_and_none_is_destroyed_then(comm: NcclCommunicator) -> None:
    from mpi4py import MPI

    library: Any = comm.library
    assert lanes.abort() and not library.aborted
    comm.all_reduce(np.ones(3)).wait()
    if comm.size > 1:
        receive_and_send(comm)
    library.streams[1].requests.append(never := MPI.COMM_SELF.Irecv(bytearray(1)))
    library.found[0] = NcclError(6, "NCCL_ERROR_REMOTE_ERROR")
    del library.log[:]
    assert lanes.abort() and library.aborted
    assert library.log == [f"abort {number}" for number in range(len(comm._lanes))]
    assert lanes.failure() == "" and lanes.abort()
    for lane in comm._lanes.values():
        lane.close()  # it does not wait for what never comes
    assert library.log == [f"abort {number}" for number in range(len(comm._lanes))]
    never.Cancel()
    never.Wait()


@pytest.mark.mpi
def test_an_abort_that_hangs_is_not_waited_for(comm: NcclCommunicator) -> None:
    library: Any = comm.library
    comm.all_reduce(np.ones(3)).wait()
    held = threading.Event()
    library.nccl.groupEnd = held.wait
    assert not lanes.abort(0.05)
    held.set()


def receive_and_send(comm: NcclCommunicator) -> None:
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    sent = comm.send(np.ones(2), right)
    comm.recv((2,), np.float64, left, like=np.empty(0)).wait()
    sent.wait()


def test_streams_of_lanes_go_first() -> None:
    library = lanes.Library.__new__(lanes.Library)
    library.cuda = SimpleNamespace(Stream=lambda **options: options)
    assert library.stream() == {"non_blocking": True, "priority": -5}


Run = Callable[..., CompletedProcess[str]]


def lost(run_mpi: Run, folder: Path, seconds: float, how: str) -> CompletedProcess[str]:
    """The job of ``lost_peer.py`` on two ranks."""
    argv = [sys.executable, "-m", "tests.comm.lost_peer", str(folder), str(seconds), how]
    return run_mpi(2, argv, env={"PYTHONPATH": str(Path(__file__).parents[2])})


def test_a_gpu_that_waits_for_a_lost_peer_ends_the_job(run_mpi: Run, tmp_path: Path) -> None:
    """The host waits for the stream, in no call of MPI: it goes on once all is aborted, and nothing comes of that."""
    done = lost(run_mpi, tmp_path, 2, "absent")
    assert done.returncode == 69, done.stderr
    said = diagnose(tmp_path)[0]
    assert said.startswith("rank 1 has not joined all_reduce 2 of dp (float32, 16) at "), said
    assert "lost_peer.py" in said and ", in which rank 0 waits since " in said and said in done.stderr
    log = json.loads((tmp_path / "woken_0").read_text())
    assert log[-1] == "abort 0"
    assert not list(tmp_path.glob("saved_*"))


def test_a_peer_that_never_connects_ends_the_job(run_mpi: Run, tmp_path: Path) -> None:
    done = lost(run_mpi, tmp_path, 2, "unconnected")
    assert done.returncode == 69, done.stderr
    assert diagnose(tmp_path)[0].startswith("rank 1 has not joined all_reduce 1 of dp (float64, 16) at ")


def test_an_error_in_the_background_ends_the_job_and_is_named(run_mpi: Run, tmp_path: Path) -> None:
    """Long before the time-out."""
    done = lost(run_mpi, tmp_path, 50, "broken")
    assert done.returncode == 69, done.stderr
    said = diagnose(tmp_path)
    assert said[0] == "rank 0: NCCL of dp, collectives: NCCL_ERROR_REMOTE_ERROR: remote process exited"
    assert said[0] in done.stderr and not list(tmp_path.glob("saved_*"))


def test_a_process_that_ends_by_an_exception_waits_for_nobody(run_mpi: Run, tmp_path: Path) -> None:
    done = lost(run_mpi, tmp_path, 50, "raised")
    assert done.returncode == 70 and "ValueError: planted" in done.stderr, done.stderr
    assert json.loads((tmp_path / "failed_1").read_text())[-1] == "abort 0"


def test_lanes() -> None:
    from hpcmp.comm.nccl import message_lane, message_lanes

    assert message_lanes(1) == []
    assert len(message_lanes(2)) == 4
    for size in range(2, 9):
        for rank in range(size):
            neighbours = [peer for peer in (rank - 1, rank + 1) if 0 <= peer < size]
            pairs = [pair for peer in neighbours for pair in ((rank, peer), (peer, rank))]
            lanes = [message_lane(*pair, tag) for pair in pairs for tag in (0, 1)]
            assert len(set(lanes)) == len(lanes) and set(lanes) <= set(message_lanes(size))


PLANS = [make_schedule(name, v) for name in SCHEDULES for v in ((2, 3) if name == "interleaved" else (1,))]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.name}-{plan.chunks}")
@pytest.mark.parametrize("size", range(2, 7))
def test_no_schedule_waits_for_ever(plan: Schedule, size: int) -> None:
    """With messages that hold their lane until both sides have come to them, as NCCL's do."""
    from hpcmp.comm.nccl import message_lane

    for microbatches in (1, 2, size, 3 * size + 1):
        for schedule in (plan, plan.forward_only()):
            assert completes(schedule, size, microbatches, message_lane), f"{microbatches} microbatches"


def test_fewer_lanes_would_wait_for_ever() -> None:
    assert not completes(make_schedule("1f1b"), 4, 8, lambda source, target, tag: 0)
    assert not completes(make_schedule("zb-v"), 4, 8, lambda source, target, tag: (target > source, source % 2))


def completes(schedule: Schedule, size: int, microbatches: int, lane: Callable[[int, int, int], Any]) -> bool:
    """Whether the ranks come to an end: each acts in its order, begins to receive what its next action takes in before
    it executes one, and each of its lanes moves its messages in theirs. A message is (source, target, action)."""
    work: list[list[tuple[str, Any]]] = [[] for _ in range(size)]  # what each rank does, in its order
    for rank in range(size):
        actions = list(schedule(rank, size, microbatches))
        causes = [schedule.cause(rank, size, action) for action in actions]
        coming = [(c[0], rank, a) if c and c[0] != rank else None for a, c in zip(actions, causes, strict=True)]
        for at, action in enumerate(actions):
            due = [*coming[: 2 if at == 0 else 0], *(coming[at + 1 : at + 2] if at else ())]
            work[rank] += [("start", message) for message in due if message]
            work[rank] += [("await", coming[at])] if coming[at] else []
            effect = schedule.effect(rank, size, action)
            work[rank] += [("start", (rank, *effect))] if effect and effect[0] != rank else []
    lanes: dict[Any, list[Any]] = {}  # by rank and lane: messages that have started, the first one holding the lane
    arrived: set[Any] = set()
    moved = True
    while moved:
        moved = False
        for rank in range(size):
            while work[rank] and (work[rank][0][0] != "await" or work[rank][0][1] in arrived):
                kind, message = work[rank].pop(0)
                if kind == "start":
                    name = lane(message[0], message[1], int(message[2].kind == "B"))
                    lanes.setdefault((rank, name), []).append(message)
                moved = True
        for (rank, name), queue in lanes.items():
            if queue and queue[0][0] == rank:
                other = lanes.get((queue[0][1], name), [])
                if other and other[0] == queue[0]:
                    arrived.add(queue.pop(0))
                    other.pop(0)
                    moved = True
    return not any(work) and not any(lanes.values())
