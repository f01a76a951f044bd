"""The model of NCCL (``tests/comm/nccl_model.py``) for arrays on the stand-in for a device, which captures its calls.

A lane is part of a capture from when it waits for an event of the stream that captures. Its calls are then noted, and
each replay makes them where that stream waits for the lane: as late as can be, so that what is freed, written over or
read before shows. A capture must not end before its lanes are waited for, and its events are of no use outside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

from hpcmp.comm.mesh import Mesh
from tests.comm.nccl_model import model
from tests.kernels.emulation import capture

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


class Event:
    """An event of the model; within: the capture that it belongs to, if it does."""

    def __init__(self, made: Any) -> None:
        self.made, self.within = made, None
        self.lane: Any = None

    def record(self, stream: Stream) -> None:
        self.within = stream.within()
        if self.within is None:
            self.made.record(stream.made)
        elif not stream.current:
            self.lane, self.calls = stream, len(stream.begun)

    @property
    def done(self) -> bool:
        assert self.within is None, "an event of a capture is asked for"
        return bool(self.made.done)


class Stream:
    """A stream of the model. begun: calls in the capture that it has joined, of which so many are waited for."""

    def __init__(self, made: Any, current: bool = False) -> None:
        self.made, self.current, self.ptr = made, current, made.ptr
        self.joined: Any = None
        self.begun: list[Callable[[], Any]] = []
        self.waited = 0

    def within(self) -> Any:
        """The capture that it is part of."""
        work = capture.DEVICE.work
        return work if self.current or self.joined is work else None

    def wait_event(self, event: Event) -> None:
        work = capture.DEVICE.work
        assert event.within is work, "a stream waits in a capture for what is outside of it, or the other way about"
        if work is None:
            self.made.wait_event(event.made)
        elif not self.current:
            if self.joined is not work:
                self.joined, self.begun, self.waited = work, [], 0
                capture.DEVICE.joined.append(self)
        else:
            lane = event.lane
            calls, lane.waited = lane.begun[lane.waited : event.calls], max(lane.waited, event.calls)
            capture.DEVICE.run(lambda: lane.make(calls), ())

    def make(self, calls: list[Callable[[], Any]]) -> None:
        """In a replay."""
        assert not any(self.made.requests), "the graph runs beside what the lane has begun before"
        for request in [call() for call in calls]:
            request.Wait()

    def left(self) -> bool:
        """Whether all of it is waited for, at the end of the capture."""
        self.joined = None
        return self.waited == len(self.begun)

    def synchronize(self) -> None:
        self.made.synchronize()


def library(comm: Intracomm) -> Any:
    """The model of NCCL over ``comm``."""
    made = model(comm)
    event, stream, end = made.event, made.stream, made.nccl.groupEnd
    streams = [Stream(made.streams[0], current=True)]

    def new_stream() -> Stream:
        streams.append(Stream(stream()))
        return streams[-1]

    def group_end() -> None:
        if capture.DEVICE.work is not None:
            for number, call in made.queued:
                assert streams[number].within() is not None, "a call in a capture whose lane is not part of it"
                streams[number].begun.append(call)
            made.queued.clear()
        end()

    made.nccl.groupEnd = group_end
    made.stream, made.current, made.event = new_stream, lambda: streams[0], lambda timed=False: Event(event())
    made.on_device = lambda x: isinstance(x, capture.OnDevice)
    return made


@contextlib.contextmanager
def over_nccl() -> Iterator[None]:
    """Ranks of a mesh communicate over it."""
    from hpcmp.comm.mpi import MpiCommunicator
    from hpcmp.comm.nccl import NcclCommunicator

    def communicator(mesh: Any, ranks: list[int]) -> NcclCommunicator:
        group = mesh.comm.group.Incl(ranks)
        comm = mesh.comm.Create_group(group)
        group.Free()
        return NcclCommunicator(MpiCommunicator(comm), library(comm))

    with mock.patch.object(Mesh, "_communicator", communicator):
        yield
