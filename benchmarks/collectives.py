"""Collectives between ranks of a node: shared memory (hpcmp's window), MPI's own, and gloo; for docs/node.md.

    mpirun -n 2 python benchmarks/collectives.py                          # 4 KiB to 64 MiB
    mpirun -n 2 python benchmarks/collectives.py --torch PYTHON           # besides gloo, in a Python that has torch
    mpirun -n 2 python benchmarks/collectives.py --largest 256

As in the OSU benchmarks and nccl-tests: the size is that of the whole message, in float32 (what an all_gather yields),
the bus bandwidth what a ring would move over each link, (n - 1) / n of it a call, twice as much for an all_reduce. The
backends take turns; a time is the median over the turns of the slowest rank's mean. hpcmp allocates what it returns,
the others write where they are told.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import machine
from hpcmp.comm.base import Communicator

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather")
Measure = Callable[[str, int, int], float]  # of an operation, the bytes and how many calls: seconds of one


def bus(operation: str, nbytes: int, ranks: int) -> float:
    """Bytes over each link of a ring, in a call."""
    return (2 if operation == "all_reduce" else 1) * (ranks - 1) / ranks * nbytes


def of(comm: Communicator, world: Intracomm) -> Measure:
    """The time of a communicator's calls; collective."""
    from mpi4py import MPI

    def measure(operation: str, nbytes: int, calls: int) -> float:
        x = np.zeros(nbytes // 4 // (comm.size if operation == "all_gather" else 1), np.float32)
        call: Any = getattr(comm, operation)
        settings = {"out": x} if operation == "all_reduce" else {}
        call(x, **settings).wait()
        world.Barrier()
        start = time.perf_counter()
        for _ in range(calls):
            call(x, **settings).wait()
        return float(world.allreduce((time.perf_counter() - start) / calls, MPI.MAX))

    return measure


class Gloo:
    """The same with gloo, by processes that rank 0 has started; the other ranks sleep meanwhile."""

    def __init__(self, python: str, world: Intracomm) -> None:
        self.world, self.processes = world, []
        if world.rank:
            return
        self.place = tempfile.TemporaryDirectory()
        script = str(Path(__file__).parent / "peers" / "torch_collectives.py")
        for rank in range(world.size):
            command = [python, script, str(rank), str(world.size), f"{self.place.name}/ranks"]
            self.processes.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_plain())
            )
        for process in self.processes:
            process.stdout.readline()

    def __call__(self, operation: str, nbytes: int, calls: int) -> float:
        found = math.nan
        if self.world.rank == 0:
            for process in self.processes:
                process.stdin.write(f"{operation} {nbytes} {calls}\n")
                process.stdin.flush()
            found = max(float(process.stdout.readline() or "nan") for process in self.processes)
        request = self.world.Ibarrier()
        while not request.Test():
            time.sleep(1e-3)
        return float(self.world.bcast(found))

    def stop(self) -> None:
        """End them."""
        for process in self.processes:
            process.stdin.close()
            process.wait(30)


def _plain() -> dict[str, str]:
    """The environment without what mpirun has added, which torch's processes have nothing to do with."""
    import os

    return {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PMI_", "PRTE_", "PYTHONPATH"))}


def table(backends: dict[str, Measure], world: Intracomm, largest: int, turns: int) -> list[str]:
    """A Markdown table of every operation and size."""
    names = list(backends)
    others = [name for name in names if name != "window"]
    head = [*(f"{name}, us" for name in names), *(f"{name} / window" for name in others), "GB/s of window"]
    lines = [f"| | bytes | {' | '.join(head)} |", "|---" * (len(head) + 2) + "|"]
    for operation in OPERATIONS:
        nbytes = 4096
        while nbytes <= largest:
            seconds: dict[str, list[float]] = {name: [] for name in names}
            for turn in range(turns):
                for i in range(len(names)):  # each begins in turn: what comes after another finds that one's traces
                    name = names[(turn + i) % len(names)]
                    calls = max(2, min(100, 2**22 // nbytes))
                    seconds[name].append(backends[name](operation, nbytes, calls))
            medians = {name: statistics.median(found) for name, found in seconds.items()}
            speed = bus(operation, nbytes, world.size) / medians["window"] / 1e9
            cells = [*(f"{medians[name] * 1e6:,.0f}" for name in names)]
            cells += [f"{medians[name] / medians['window']:.2f}" for name in others]
            size = f"{nbytes // 1024} KiB" if nbytes < 2**20 else f"{nbytes // 2**20} MiB"
            lines.append(f"| {operation} | {size} | {' | '.join(cells)} | {speed:.2f} |")
            nbytes *= 4
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--torch", metavar="PYTHON", help="a Python interpreter that has torch: measures gloo")
    parser.add_argument("--largest", type=int, default=64, help="MiB of the largest message")
    parser.add_argument("--turns", type=int, default=7, help="of each backend and size")
    parser.add_argument("--window-mb", type=float, default=4, help="MiB of a rank's window")
    args = parser.parse_args(argv)

    from hpcmp.comm.detect import start_mpi

    world = start_mpi().COMM_WORLD
    from hpcmp.comm.mpi import MpiCommunicator
    from hpcmp.comm.window import LEAST, WindowCommunicator

    here = machine()
    window = WindowCommunicator(world.Dup(), int(args.window_mb * 2**20), dict.fromkeys(LEAST, 0))
    mpi = MpiCommunicator(world.Dup())
    backends: dict[str, Measure] = {"window": of(window, world), "MPI": of(mpi, world)}
    gloo = Gloo(args.torch, world) if args.torch else None
    if gloo:
        backends["gloo"] = gloo
    lines = table(backends, world, args.largest * 2**20, args.turns)
    if world.rank == 0:
        print(f"{world.size} ranks; {here['cpu']}, {here['cores']} cores; load {here['load'][0]:.1f} at the start")
        print("\n".join(lines))
    if gloo:
        gloo.stop()
    for comm in (window, mpi):
        comm.close()


if __name__ == "__main__":
    main()
