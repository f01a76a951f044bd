"""Locks of other processes, alive and dead, for the tests of locks."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hpcmp.checkpoint import owner
from hpcmp.checkpoint.owner import Job, Owner, this_process


def forge(folder: Path, **changes: object) -> Path:
    """A lock as this process would have it, but for what is changed."""
    path = folder / "lock"
    path.with_name("forged").write_bytes(dataclasses.replace(this_process(), **changes).render())
    return path.with_name("forged").replace(path)


def elsewhere(folder: Path, **changes: object) -> Path:
    """A lock of another machine's process."""
    return forge(folder, **{"host": "node7", "machine": "node7/boot/1", "pid": 4711, "job": Job()} | changes)


def neighbour(folder: Path) -> Path:
    """A lock of a process of this machine that lives."""
    return forge(folder, pid=os.getppid(), start=owner._stat(os.getppid())[1])


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


class Clock:
    """Time for the lock module: whenever it sleeps, one of ``events`` happens, in their order; then it sleeps."""

    def __init__(self, *events: Callable[[], object]) -> None:
        self.events = list(events)

    def sleep(self, seconds: float) -> None:
        if self.events:
            self.events.pop(0)()
        time.sleep(seconds)


def until(happens: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_taken(folder: Path) -> None:
    """This process has the lock, and nothing else is left behind."""
    assert Owner.parse((folder / "lock").read_bytes()).is_me
    assert [path.name for path in folder.iterdir() if "lock" in path.name] == ["lock"]
