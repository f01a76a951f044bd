"""A program of many ranks that comes to grief: ``python -m tests.training.hanging FOLDER SECONDS HOW``."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from hpcmp.comm.detect import start_mpi
from hpcmp.comm.mesh import Mesh
from hpcmp.training import watchdog as guard


def absent(mesh: Mesh) -> None:
    if mesh.rank == mesh.size - 1:
        time.sleep(600)


def slow(mesh: Mesh) -> None:
    if mesh.rank == mesh.size - 1:
        time.sleep(0.5)


def dtype(mesh: Mesh) -> None:
    """The ranks' numbers are of two kinds, which MPI adds up without a word, and then the last rank is absent."""
    mesh["dp"].all_reduce(np.ones(64, np.float32 if mesh.rank else np.int32)).wait()
    absent(mesh)


def counts(mesh: Mesh) -> None:
    """The last rank takes fewer numbers than it is sent, which MPI tells that rank alone."""
    mesh["dp"].broadcast(np.ones(64 if mesh.rank == mesh.size - 1 else 128)).wait()


def message(mesh: Mesh) -> None:
    """Rank 0 waits for what nobody sends, and all others for rank 0."""
    if mesh.rank == 0:
        mesh["dp"].recv((5,), np.float64, 1, 3, like=np.empty(0)).wait()


def object(mesh: Mesh) -> None:
    absent(mesh)
    mesh.gather_objects("what")


def killed(mesh: Mesh) -> None:
    if mesh.rank == mesh.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)


def crashed(mesh: Mesh) -> None:
    if mesh.rank == mesh.size - 1:
        ctypes.string_at(0)


def raised(mesh: Mesh) -> None:
    if mesh.rank == mesh.size - 1:
        raise ValueError("planted")


def holding(mesh: Mesh) -> None:
    """Python's lock is held for ever, so that no thread of the process runs."""
    if mesh.rank == mesh.size - 1:
        ctypes.PyDLL(None).sleep(600)


def stopped(mesh: Mesh) -> None:
    """The process does nothing any more, its watchdog neither."""
    if mesh.rank == mesh.size - 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def suspended(mesh: Mesh) -> None:
    """All processes stop for a while, as `scontrol suspend` has them; all but the last one in the middle of a call."""
    guard.PAUSE = 1.5  # so that the test is short
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -STOP {os.getpid()}; sleep 3.5; kill -CONT {os.getpid()}"])
    end = time.monotonic() + 5
    over = np.zeros(1)
    while not over[0]:
        if mesh.rank == mesh.size - 1:
            time.sleep(0.2)
        over = mesh["dp"].all_reduce(np.array([float(time.monotonic() > end)])).wait()


def main(folder: str, seconds: str, how: str) -> None:
    """Some steps, the fault, and one more."""
    world = start_mpi().COMM_WORLD
    mesh = Mesh(world, dp=world.size)
    watchdog = guard.watch(Path(folder), mesh, float(seconds))
    fault: Any = globals()[how]
    for _ in range(3):
        mesh["dp"].all_reduce(np.ones(64)).wait()
    try:
        fault(mesh)
        mesh["dp"].all_reduce(np.ones(16, np.float32)).wait()
    except Exception as error:
        guard.failed(error, Path(folder), mesh, watchdog)
        raise
    if watchdog is not None:
        watchdog.stop()
    mesh.close()
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
