"""NcclCommunicator without a GPU: NumPy arrays in place of CuPy's, and a model of NCCL's calls over MPI.

What the model cannot show is left to tests/gpu: that streams and events order anything.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.parallel.schedules import SCHEDULES, Schedule, make_schedule
from tests.comm.cases import differences

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

    from hpcmp.comm.nccl import NcclCommunicator

TYPES = ("INT8", "UINT8", "INT32", "UINT32", "INT64", "UINT64", "FLOAT16", "FLOAT32", "FLOAT64")


def model(world: Intracomm) -> Any:
    """A Library over ``world`` whose log tells what was called. Calls take addresses, counts and types as NCCL's do."""
    from mpi4py import MPI

    from hpcmp.comm.nccl import Library

    ops = {0: MPI.SUM, 2: MPI.MAX}

    class Event:
        def record(self, stream: Any) -> None:
            library.log.append(f"{stream.name} records")
            self.requests = list(stream.requests)

        @property
        def done(self) -> bool:
            return MPI.Request.Testall(self.requests)

    class Stream:
        def __init__(self, name: str) -> None:
            self.name, self.ptr = name, len(library.streams)
            self.requests: list[Any] = []
            library.streams.append(self)

        def wait_event(self, event: Event) -> None:
            library.log.append(f"{self.name} waits")
            MPI.Request.Waitall(event.requests)

        def synchronize(self) -> None:
            MPI.Request.Waitall(self.requests)

    class Nccl:
        """NCCL's communicator: a call is queued, and its MPI call made when its group ends."""

        def __init__(self, size: int, unique_id: bytes, rank: int) -> None:
            assert (size, rank) == (world.size, world.rank)
            assert len(set(world.allgather(unique_id))) == 1, "ranks have different ids"
            self.comm = world.Dup()

        def queue(self, name: str, stream: int, call: Callable[[], Any]) -> None:
            assert library.depth == 1, "a call outside a group"
            library.log.append(name)
            library.queued.append((stream, call))

        def allReduce(self, send: int, recv: int, count: int, kind: int, op: int, stream: int) -> None:
            x = MPI.IN_PLACE if send == recv else at(send, count, kind)
            self.queue("allReduce", stream, lambda: self.comm.Iallreduce(x, at(recv, count, kind), ops[op]))

        def broadcast(self, send: int, recv: int, count: int, kind: int, root: int, stream: int) -> None:
            if world.rank == root and send != recv:
                at(recv, count, kind)[...] = at(send, count, kind)
            self.queue("broadcast", stream, lambda: self.comm.Ibcast(at(recv, count, kind), root))

        def reduce(self, send: int, recv: int, count: int, kind: int, op: int, root: int, stream: int) -> None:
            y = at(recv, count, kind) if world.rank == root else None
            self.queue("reduce", stream, lambda: self.comm.Ireduce(at(send, count, kind), y, ops[op], root))

        def allGather(self, send: int, recv: int, count: int, kind: int, stream: int) -> None:
            x, y = at(send, count, kind), at(recv, count * world.size, kind)
            self.queue("allGather", stream, lambda: self.comm.Iallgather(x, y))

        def reduceScatter(self, send: int, recv: int, count: int, kind: int, op: int, stream: int) -> None:
            x, y = at(send, count * world.size, kind), at(recv, count, kind)
            self.queue("reduceScatter", stream, lambda: self.comm.Ireduce_scatter_block(x, y, ops[op]))

        def send(self, send: int, count: int, kind: int, peer: int, stream: int) -> None:
            self.queue("send", stream, lambda: self.comm.Issend(at(send, count, kind), peer))

        def recv(self, recv: int, count: int, kind: int, peer: int, stream: int) -> None:
            self.queue("recv", stream, lambda: self.comm.Irecv(at(recv, count, kind), peer))

        def destroy(self) -> None:
            self.comm.Free()

    def group_start() -> None:
        library.depth += 1

    def group_end() -> None:
        library.depth -= 1
        for stream, call in library.queued:
            library.streams[stream].requests.append(call())
        library.queued.clear()

    class Model(Library):
        def __init__(self) -> None:
            self.log: list[str] = []
            self.streams: list[Any] = []
            self.queued: list[tuple[int, Callable[[], Any]]] = []
            self.depth, self.device = 0, True
            constants = {f"NCCL_{name}": i for i, name in enumerate(TYPES)} | {"NCCL_SUM": 0, "NCCL_MAX": 2}
            self.nccl = SimpleNamespace(
                NcclCommunicator=Nccl,
                get_unique_id=lambda: bytes([world.rank]) * 128,
                groupStart=group_start,
                groupEnd=group_end,
                **constants,
            )

        def on_device(self, x: Any) -> bool:
            return self.device

        def pointer(self, x: Any) -> int:
            assert x.flags.c_contiguous, "NCCL was given an array that is not contiguous"
            return int(x.ctypes.data)

        def stream(self) -> Any:
            return Stream(f"lane {len(self.streams) - 1}")

        def current(self) -> Any:
            return self.streams[0]

        def event(self) -> Any:
            return Event()

    library = Model()
    Stream("current")
    return library


def at(address: int, count: int, kind: int) -> np.ndarray:
    """The array at an address, of a type by its number."""
    assert count > 0, "NCCL was asked to move nothing"
    dtype = np.dtype(TYPES[kind].lower())
    memory: Any = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    found: np.ndarray = np.frombuffer(memory, dtype)
    return found


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
