"""A model of NCCL's calls over MPI, of streams and of events, for arrays of NumPy in place of CuPy's.

What it cannot show is left to tests/gpu: that streams and events order anything.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

TYPES = ("INT8", "UINT8", "INT32", "UINT32", "INT64", "UINT64", "FLOAT16", "FLOAT32", "FLOAT64")


class NcclError(RuntimeError):
    """As CuPy raises it."""

    def __init__(self, status: int, name: str) -> None:
        super().__init__(name)
        self.status = status


def model(world: Intracomm) -> Any:
    """A Library over ``world`` whose log tells what was called. Calls take addresses, counts and types as NCCL's do.

    lazy: a stream that is to wait does so, as on a GPU, and the host waits in ``synchronize`` alone. found: what
    communicators have found in the background. After an abort every stream goes on.
    """
    from mpi4py import MPI

    from hpcmp.comm.lanes import Library

    ops = {0: MPI.SUM, 2: MPI.MAX}
    lock = threading.Lock()  # MPI forbids two threads to ask for one request

    def over(requests: list[Any]) -> bool:
        with lock:
            return library.aborted or MPI.Request.Testall(requests)

    class Event:
        def record(self, stream: Any) -> None:
            library.log.append(f"{stream.name} records")
            self.requests = list(stream.requests)

        @property
        def done(self) -> bool:
            return over(self.requests)

    class Stream:
        def __init__(self, name: str) -> None:
            self.name, self.ptr = name, len(library.streams)
            self.requests: list[Any] = []
            library.streams.append(self)

        def wait_event(self, event: Event) -> None:
            library.log.append(f"{self.name} waits")
            if library.lazy:
                self.requests += event.requests
            else:
                MPI.Request.Waitall(event.requests)

        def synchronize(self) -> None:
            while not over(self.requests):
                time.sleep(1e-3)

    class Nccl:
        """NCCL's communicator: a call is queued, and its MPI call made when its group ends."""

        def __init__(self, size: int, unique_id: bytes, rank: int) -> None:
            assert (size, rank) == (world.size, world.rank)
            assert len(set(world.allgather(unique_id))) == 1, "ranks have different ids"
            self.comm, self.number = world.Dup(), len(library.streams) - 1

        def queue(self, name: str, stream: int, call: Callable[[], Any]) -> None:
            assert library.depth == 1, "a call outside a group"
            library.log.append(name)
            library.queued.append((stream, call))

        def allReduce(self, send: int, recv: int, count: int, kind: int, op: int, stream: int) -> None:
            x = MPI.IN_PLACE if send == recv else at(send, count, kind)
            self.queue("allReduce", stream, lambda: self.comm.Iallreduce(x, at(recv, count, kind), ops[op]))

        def broadcast(self, send: int, recv: int, count: int, kind: int, root: int, stream: int) -> None:
            def call() -> Any:
                if world.rank == root and send != recv:
                    at(recv, count, kind)[...] = at(send, count, kind)
                return self.comm.Ibcast(at(recv, count, kind), root)

            self.queue("broadcast", stream, call)

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

        def check_async_error(self) -> None:
            assert threading.get_ident() in library.attached, "a thread without the process's GPU"
            if self.number in library.found:
                raise library.found[self.number]

        def abort(self) -> None:
            assert library.depth == 1, "one aborted before the other"
            assert threading.get_ident() in library.attached, "a thread without the process's GPU"
            library.log.append(f"abort {self.number}")
            library.aborting = True

        def destroy(self) -> None:
            library.log.append(f"destroy {self.number}")
            self.comm.Free()

    def group_start() -> None:
        library.depth += 1

    def group_end() -> None:
        library.depth -= 1
        for stream, call in library.queued:
            library.streams[stream].requests.append(call())
        library.queued.clear()
        library.aborted = library.aborting

    class Model(Library):
        def __init__(self) -> None:
            self.log: list[str] = []
            self.streams: list[Any] = []
            self.queued: list[tuple[int, Callable[[], Any]]] = []
            self.found: dict[int, Exception] = {}
            self.attached: set[int] = set()
            self.depth, self.device, self.lazy = 0, True, False
            self.aborting = self.aborted = False
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

        def event(self, timed: bool = False) -> Any:
            return Event()

        def attach(self) -> None:
            self.attached.add(threading.get_ident())

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
