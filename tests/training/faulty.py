"""``hpcmp train`` with a fault in its third step: ``python -m tests.training.faulty HOW CONFIG.toml [key=value ...]``

The fault is the last rank's. An argument that begins with ``last:`` is given to the last rank alone.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from hpcmp.cli import main
from hpcmp.comm.detect import launcher
from hpcmp.comm.mesh import DATA
from hpcmp.training.engine import Engine

STEP = 2


def none(engine: Engine) -> None:
    pass


def killed(engine: Engine) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crashed(engine: Engine) -> None:
    ctypes.string_at(0)


def memory(engine: Engine) -> None:
    """There is no more, as under ``ulimit -v``."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, resource.RLIM_INFINITY))
    np.ones(2**24)


def dtype(engine: Engine) -> None:
    """One collective more, whose numbers are of another kind than those that the other ranks then add up."""
    engine.mesh[DATA].all_reduce(np.ones(8, np.int32)).wait()


def nan(engine: Engine) -> None:
    stage = engine.stages[-1]
    backward = stage.backward

    def planted(dy: Any, *more: Any) -> Any:
        dy = dy.copy()
        dy.reshape(-1)[:1] = np.nan
        return backward(dy, *more)

    stage.backward = planted  # type: ignore[method-assign]


def flipped(engine: Engine) -> None:
    """A bit of a weight, high enough that the next steps do not round it away."""
    engine.buckets.buckets[0].master.reshape(-1).view(np.uint8)[2] ^= 16


def slow(engine: Engine) -> None:
    """From now on."""
    step = engine.pipeline.step

    def sleepy(*args: Any) -> Any:
        time.sleep(0.5)
        return step(*args)

    engine.pipeline.step = sleepy  # type: ignore[method-assign]


def terminated(engine: Engine) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def warned(engine: Engine) -> None:
    """By the launcher, which has the session to itself, and hands on to its ranks what a batch system sends."""
    os.kill(os.getsid(0), signal.SIGUSR1)


def twice(engine: Engine) -> None:
    """While the rank waits in MPI for what never comes; until it ends: two may be seen as one where cores are busy."""

    def send() -> None:
        while True:
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(1.2)

    threading.Thread(target=send, daemon=True).start()
    engine.mesh["dp"].recv((1,), np.float32, 0, 99, like=np.empty(0)).wait()


def cut(engine: Engine) -> None:
    """The data file, while all ranks read it."""
    path = engine.config.data.path
    assert path is not None
    os.truncate(path, os.path.getsize(path) // 2)


def full(engine: Engine) -> None:
    """The disk that the metrics are written to."""
    assert engine.config.run.directory is not None
    metrics = Path(engine.config.run.directory) / "metrics.jsonl"
    metrics.unlink()
    metrics.symlink_to("/dev/full")


def start(how: str, *argv: str) -> int:
    job = launcher()
    assert job is not None
    last, fault, right = job.rank == job.size - 1, globals()[how], Engine.begin

    def begin(self: Engine, number: int, *data: Any, **options: Any) -> Any:
        if number == STEP and last:
            fault(self)
        return right(self, number, *data, **options)

    Engine.begin = begin  # type: ignore[method-assign]
    return main(["train", *(word.removeprefix("last:") for word in argv if last or not word.startswith("last:"))])


if __name__ == "__main__":
    sys.exit(start(*sys.argv[1:]))
