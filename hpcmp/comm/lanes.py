"""Lanes: NCCL communicators, each with a stream of its own, in the order of which its operations run; and their end.

An NCCL operation whose peer is lost never ends, and neither does what waits for its stream, in ``destroy`` for one. The
lanes of a process are therefore known here (``failure``, ``abort``) to the watchdog, and given up at the process's end.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import Array, array_module
from ..errors import HpcmpError, InputError
from .base import Pending, Timed
from .replay import Replay, noting

if TYPE_CHECKING:
    from .mpi import MpiCommunicator

Call = tuple[int, Callable[[int], None]]  # how many elements it moves, and the call itself, given the stream's pointer

_URGENT = -5  # the highest priority that there is; CUDA takes its own highest where that is lower
_IN_PROGRESS = 7  # ncclInProgress
_open: list[Lane] = []  # of this process, in the order in which they were made
_guard = threading.Lock()  # nobody asks a communicator for its errors while it is being freed


class Library:
    """What of CuPy is used: NCCL's calls, streams and events. Tests put a model of it in its place."""

    def __init__(self) -> None:
        import cupy
        from cupy.cuda import nccl

        if not nccl.available:
            raise InputError('communication.backend: CuPy finds no NCCL (see docs/gpu.md); "mpi" needs none')
        self.cuda, self.nccl = cupy.cuda, nccl
        self.gpu = cupy.cuda.Device()

    def on_device(self, x: Array) -> bool:
        """Whether ``x`` is NCCL's to move."""
        return array_module(x) is not np

    def pointer(self, x: Array) -> int:
        """The address of the first element of a contiguous array."""
        return int(x.data.ptr)

    def stream(self) -> Any:
        """A new stream, which no other stream waits for unless it is told to. Its kernels go first: they are few and
        short of work, and what waits for them is a whole GPU."""
        return self.cuda.Stream(non_blocking=True, priority=_URGENT)

    def current(self) -> Any:
        """The stream on which the caller computes."""
        return self.cuda.get_current_stream()

    def event(self, timed: bool = False) -> Any:
        """A new event, which knows when it was if it is ``timed``."""
        return self.cuda.Event(disable_timing=not timed)

    def attach(self) -> None:
        """Have this thread ask for this process's GPU. A new thread has GPU 0, and its first call makes a context
        there, of some hundred MB."""
        self.gpu.use()


def nccl_version() -> int:
    """The version of CuPy's NCCL, such as 23003; 0 without one."""
    from cupy.cuda import nccl

    return int(nccl.get_version()) if nccl.available else 0


class Done:
    """The end of an operation, as ``Pending`` asks for it; its names are those of an MPI request.

    began: for a profile (``Timed``), the event of its start. waits: those before and after a stream waits for it.
    """

    def __init__(self, library: Library, event: Any, began: Any = None) -> None:
        self.library, self.event, self.began = library, event, began
        self.waits: list[Any] = []

    def Wait(self) -> None:
        """What is queued from now on runs after it."""
        stream = self.library.current()
        if self.began is None:
            stream.wait_event(self.event)
            return
        self.waits = [self.library.event(timed=True), self.library.event(timed=True)]
        self.waits[0].record(stream)
        stream.wait_event(self.event)
        self.waits[1].record(stream)

    def Test(self) -> bool:
        """Whether it is over."""
        return bool(self.event.done)


class Lane:
    """An NCCL communicator with a stream of its own: its operations run in the order in which they are started.

    Making one is collective over ``control``, which carries NCCL's unique id. name: of its ranks and of what it
    carries, for messages.
    """

    def __init__(self, library: Library, control: MpiCommunicator, name: str) -> None:
        comm = control.comm
        unique_id = comm.bcast(library.nccl.get_unique_id() if comm.rank == 0 else None)
        try:
            self.nccl = library.nccl.NcclCommunicator(comm.size, unique_id, comm.rank)
        except RuntimeError as error:
            advice = 'NCCL_DEBUG=WARN in the environment says more, communication.backend = "mpi" does without'
            raise HpcmpError(f"NCCL does not connect {comm.size} ranks ({error}): {advice}") from error
        self.library, self.stream, self.name = library, library.stream(), name
        self.graphs: weakref.WeakSet[Replay] = weakref.WeakSet()  # that have operations of it
        self.last: Any = None  # the event at the end of its last operation that is in no graph
        if not _open:
            atexit.unregister(abort)
            atexit.register(abort)  # after an error nobody has closed them, and CuPy would wait in destroy
        _open.append(self)

    def start(self, calls: list[Call], result: Array, *keep: Any) -> Pending:
        """Queue NCCL calls as one operation; those that move nothing are left out, on every rank alike."""
        replay = noting()
        timed = Timed.kept is not None and replay is None  # there are no times in a graph
        ready, done = self.library.event(), self.library.event(timed)
        ready.record(self.library.current())
        self.stream.wait_event(ready)
        began = self.library.event(timed) if timed else None
        if began is not None:
            began.record(self.stream)
        self.library.nccl.groupStart()
        for count, call in calls:
            if count:
                call(self.stream.ptr)
        self.library.nccl.groupEnd()
        done.record(self.stream)
        if replay is None:
            self.last = done
        else:
            replay.lanes[self] = None
        return Pending(result, [Done(self.library, done, began)], None, *keep)

    def settle(self) -> None:
        """What is queued from now on runs after what has been started here."""
        if self.last is not None:
            self.library.current().wait_event(self.last)

    def mark(self) -> Done:
        """The end of what is queued on the current stream."""
        event = self.library.event()
        event.record(self.library.current())
        return Done(self.library, event)

    def close(self) -> None:
        """Finish what runs, and free the communicator; graphs that have operations of it are given up. Nothing is left
        to do after ``abort``."""
        self.stream.synchronize()
        for graph in tuple(self.graphs):
            graph.release()
        with _guard:
            ours = self in _open
            if ours:
                _open.remove(self)
        if ours:
            self.nccl.destroy()

    def error(self) -> str:
        """What NCCL has found meanwhile, in the background: ``NCCL of dp, collectives: NCCL_ERROR_...``; or ""."""
        try:
            self.nccl.check_async_error()
        except (RuntimeError, KeyError) as error:  # KeyError: of a status that CuPy 14.2 has no name for, from 7 on
            status = getattr(error, "status", error.args[0])
            if status != _IN_PROGRESS:
                return f"NCCL of {self.name}: {error if isinstance(error, RuntimeError) else f'status {status}'}"
        return ""


def failure() -> str:
    """The first error that NCCL has found in the background on a lane of this process, such as a lost connection; or
    "". Safe in any thread."""
    with _guard:
        if _open:
            _open[0].library.attach()
        return next(filter(None, (lane.error() for lane in _open)), "")


def abort(seconds: float = 10.0) -> bool:
    """Give up all lanes of this process, whatever runs on them: who waits for their streams goes on, with results that
    mean nothing. Returns whether that was done in so many seconds. Not collective; safe in any thread.

    All of them in one group, which NCCL aborts together from version 2.22 on: one after the other, the first may wait
    for the GPU, on which an operation of the next still runs. It has been seen to wait for ever all the same.
    """
    with _guard:
        lanes, _open[:] = list(_open), []
    if not lanes:
        return True
    thread = threading.Thread(target=_abort, args=(lanes,), name="hpcmp abort", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # Python starts none any more when it ends
        _abort(lanes)
        return True
    thread.join(seconds)
    return not thread.is_alive()


def _abort(lanes: list[Lane]) -> None:
    library = lanes[0].library
    library.attach()
    library.nccl.groupStart()
    for lane in lanes:
        lane.nccl.abort()
    library.nccl.groupEnd()
