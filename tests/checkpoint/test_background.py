"""What saving in the background is made of: a thread that can be given up, and memory for copies."""

from __future__ import annotations

import time

import pytest

from hpcmp.checkpoint import snapshot
from hpcmp.checkpoint.background import GivenUp, Task, check
from hpcmp.comm.mesh import Mesh
from tests.checkpoint.cases import owned


def test_memory_is_aligned_and_apart():
    slabs = list(owned(Mesh(), 1))
    copies = snapshot.Memory().like(slabs)
    assert [(c.name, c.shape, c.index, c.data.shape, c.data.dtype) for c in copies] == [
        (s.name, s.shape, s.index, s.data.shape, s.data.dtype) for s in slabs
    ]
    spans = sorted((c.data.ctypes.data, c.data.ctypes.data + c.data.nbytes) for c in copies if c.data.size)
    assert all(stop <= start for (_, stop), (start, _) in zip(spans, spans[1:], strict=False))
    assert all((start - spans[0][0]) % 64 == 0 for start, _ in spans)


def test_a_task_without_a_thread_runs_at_once(monkeypatch):
    def no_thread(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Task, "start", no_thread)
    assert Task(lambda: 3).result() == 3
    with pytest.raises(OSError, match="full"):
        Task(lambda: (_ for _ in ()).throw(OSError("full"))).result()


def test_a_task_stops_where_it_checks():
    check()  # outside of a task nothing

    def endless():
        while True:
            check()
            time.sleep(0.001)

    task = Task(endless)
    assert task.is_alive()
    task.give_up()
    assert not task.is_alive()
    with pytest.raises(GivenUp):
        task.result()
