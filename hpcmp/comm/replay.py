"""Operations in CUDA graphs: noted while they are captured, then counted, checked and recorded each time that they run.

NCCL takes part in a capture as any kernel does: an operation's lane joins it by the event that the operation waits for,
and leaves it when the operation is waited for. What a communicator does beside that on the host is not in the graph.
NCCL asks that the same operations are captured on all of their ranks, and that these launch the graphs of one capture
together: ``captured.py`` sees to that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from .recorder import Record

if TYPE_CHECKING:
    from .lanes import Lane


class Graph(Protocol):
    """Captured work, or what has some."""

    def launch(self) -> None:
        """Run it after what is queued on the current stream."""


class Replay:
    """A graph with operations of communicators: ``launch`` does what calling them would.

    begins: for each operation what it does beside being queued; its record, if it makes one. lanes: on which they run.
    """

    def __init__(self) -> None:
        self.begins: list[Callable[[], Record | None]] = []
        self.lanes: dict[Lane, None] = {}
        self.graph: Graph | None = None

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Operations in the body are captured: they are noted here, in place of those that were."""
        self.begins.clear()
        self.lanes.clear()
        _here.replay = self
        try:
            yield
        finally:
            _here.replay = None

    def of(self, graph: Graph) -> Graph:
        """``graph``, which has the operations that were noted."""
        if not self.begins and not self.lanes:
            return graph
        self.graph = graph
        for lane in self.lanes:
            lane.graphs.add(self)
        return self

    def launch(self) -> None:
        """Run the graph, after what its lanes have begun so far; its operations are over when it is."""
        records = [record for begin in self.begins if (record := begin()) is not None]
        for lane in self.lanes:
            lane.settle()
        assert self.graph is not None, "its communicators are closed"
        self.graph.launch()
        done = next((lane.mark() for lane in self.lanes), None)  # the same of each: they share the current stream
        for record in records:
            record.event = done

    def release(self) -> None:
        """Give up the graph: NCCL waits for that before it frees a communicator."""
        self.graph = None


class _Here(threading.local):
    replay: Replay | None = None


_here = _Here()


def noting() -> Replay | None:
    """What notes the operations that this thread calls; None: they are not captured."""
    return _here.replay
