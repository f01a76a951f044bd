"""Threads behind the training that are as slow as a test wants them, however fast or slow the machine is."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hpcmp.checkpoint.background import Task
from hpcmp.checkpoint.snapshot import Copying

PAUSE = 0.1  # seconds that whoever waits for a call that is held waits at least
PATIENCE = 120.0  # seconds after which it is held no longer, so that a test that is wrong ends


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> Iterator[threading.Event]:
    """``where.name``, called in a thread, begins no sooner than someone waits for that thread, or gives it up; a copy
    (``Copying.finish``) no sooner than someone waits for it or its thread. The event: such a call is held."""
    awaited: list[object] = []
    holds = threading.Event()
    real, finish, settle = getattr(where, name), Task.finish, Copying.settle

    def late(*args: Any, **options: Any) -> Any:
        thread, deadline = threading.current_thread(), time.monotonic() + PATIENCE
        if isinstance(thread, Task):
            holds.set()
            while not any(it is thread or it is args[0] for it in awaited) and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(PAUSE)
        return real(*args, **options)

    def finishes(self: Task[Any], seconds: float | None = None) -> None:
        awaited.append(self)
        finish(self, seconds)

    def settles(self: Copying) -> None:
        awaited.append(self)
        settle(self)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, late)
        patch.setattr(Task, "finish", finishes)
        patch.setattr(Copying, "settle", settles)
        yield holds
