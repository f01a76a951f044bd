"""Collectives between ranks of a node: hpcmp, the two that it chooses from (its window of shared memory, and MPI's own
calls), MPI's blocking calls, and gloo; for docs/node.md.

    mpirun -n 2 python benchmarks/collectives.py                          # 4 KiB to 256 MiB
    mpirun -n 2 python benchmarks/collectives.py --torch PYTHON           # besides gloo, in a Python that has torch

As in the OSU benchmarks and nccl-tests: the size is that of the whole message, in float32 (what an all_gather yields),
the bus bandwidth what a ring would move over each link, (n - 1) / n of it a call, twice as much for an all_reduce. The
backends take turns call by call, gloo after them with a few calls together; a time is the median over the turns of the
slowest rank's. ``hpcmp`` is what shared_memory = "auto" takes for that size; ``window`` and ``MPI`` are each of the two
for every size. These allocate what they return (an all_reduce is in place), the others write where they are told.
Results go to benchmarks/results/collectives/, as JSON and as text.
"""

from __future__ import annotations

import argparse
import json
import math
import os
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

from benchmarks.common import ROOT, machine
from hpcmp.comm.base import Communicator

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast")
Call = Callable[[], Any]


def bus(operation: str, nbytes: int, ranks: int) -> float:
    """Bytes over each link of a ring, in a call."""
    return (2 if operation == "all_reduce" else 1) * (1 if operation == "broadcast" else (ranks - 1) / ranks) * nbytes


def of(comm: Communicator, operation: str, nbytes: int) -> Call:
    """A communicator's call."""
    x = np.zeros(nbytes // 4 // (comm.size if operation == "all_gather" else 1), np.float32)
    start: Any = getattr(comm, operation)
    return lambda: start(x, **({"out": x} if operation == "all_reduce" else {})).wait()


def blocking(comm: Intracomm, operation: str, nbytes: int) -> Call:
    """MPI's blocking call, by mpi4py alone: the least that MPI takes."""
    from mpi4py import MPI

    whole, part = np.zeros(nbytes // 4, np.float32), np.zeros(nbytes // 4 // comm.size, np.float32)
    return {
        "all_reduce": lambda: comm.Allreduce(MPI.IN_PLACE, whole),
        "reduce_scatter": lambda: comm.Reduce_scatter_block(whole, part),
        "all_gather": lambda: comm.Allgather(part, whole),
        "broadcast": lambda: comm.Bcast(whole),
    }[operation]


class Gloo:
    """gloo's collectives, by processes that rank 0 has started; the ranks sleep meanwhile."""

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
        """Seconds of a call, the mean of ``calls``; nan where gloo does not have it."""
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
    return {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PMI_", "PRTE_", "PYTHONPATH"))}


def measure(calls: dict[str, Call], world: Intracomm, nbytes: int) -> dict[str, list[float]]:
    """Seconds of each call in each turn, of the slowest rank; collective."""
    from mpi4py import MPI

    turns = max(5, min(200, 2**27 // nbytes))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(-1, turns):  # the first is to warm up
        for i in range(len(names)):  # each begins in turn: what comes after another finds that one's traces
            name = names[(turn + i) % len(names)]
            world.Barrier()
            start = time.perf_counter()
            calls[name]()
            seconds[name] += [time.perf_counter() - start] if turn >= 0 else []
    found = np.array(list(seconds.values()))
    world.Allreduce(MPI.IN_PLACE, found, MPI.MAX)
    return {name: list(map(float, each)) for name, each in zip(names, found, strict=True)}


def rows(comms: dict[str, Communicator], gloo: Gloo | None, world: Intracomm, largest: int) -> list[dict[str, Any]]:
    """The figures of every operation and size; collective."""
    found = []
    for operation in OPERATIONS:
        nbytes = 4096
        while nbytes <= largest:
            calls = {name: of(comm, operation, nbytes) for name, comm in comms.items()}
            calls["blocking MPI"] = blocking(world, operation, nbytes)
            seconds = measure(calls, world, nbytes)
            if gloo:
                each = max(1, min(50, 2**22 // nbytes))
                seconds["gloo"] = [gloo(operation, nbytes, each) for _ in range(5 if nbytes <= 2**24 else 3)]
            medians = {name: statistics.median(times) for name, times in seconds.items()}
            best = {name: min(times) for name, times in seconds.items()}
            found.append({"operation": operation, "bytes": nbytes, "median": medians, "best": best})
            nbytes *= 4
    return found


def text(result: dict[str, Any]) -> str:
    """A Markdown table: times of hpcmp, those of the others over them (of medians, and of the best), bandwidth."""
    m, names = result["machine"], list(result["rows"][0]["median"])[1:]
    lines = [f"{result['ranks']} ranks; {m['cpu']}, {m['cores']} cores; {m['date']} UTC; load {m['load'][0]:.1f}", ""]
    head = ["hpcmp, us", *(f"{name} / hpcmp (best)" for name in names), "GB/s"]
    lines += [f"| | | {' | '.join(head)} |", "|---" * (len(head) + 2) + "|"]
    for row in result["rows"]:
        size, here, best = row["bytes"], row["median"]["hpcmp"], row["best"]["hpcmp"]
        cells = [row["operation"], f"{size // 1024} KiB" if size < 2**20 else f"{size // 2**20} MiB"]
        cells += [f"{here * 1e6:,.0f}"]
        cells += [f"{row['median'][name] / here:.2f} ({row['best'][name] / best:.2f})" for name in names]
        lines.append(f"| {' | '.join(cells)} | {bus(row['operation'], size, result['ranks']) / here / 1e9:.1f} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--torch", metavar="PYTHON", help="a Python interpreter that has torch: measures gloo")
    parser.add_argument("--largest", type=int, default=256, help="MiB of the largest message")
    parser.add_argument("--window-mb", type=float, default=6, help="MiB of a rank's window")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "collectives")
    args = parser.parse_args(argv)

    from hpcmp.comm.detect import start_mpi

    world = start_mpi().COMM_WORLD
    from hpcmp.comm.mpi import MpiCommunicator
    from hpcmp.comm.window import EVERY, WindowCommunicator

    here, size = machine(), int(args.window_mb * 2**20)
    comms: dict[str, Communicator] = {"hpcmp": WindowCommunicator(world.Dup(), size)}
    comms |= {"window": WindowCommunicator(world.Dup(), size, EVERY), "MPI": MpiCommunicator(world.Dup())}
    gloo = Gloo(args.torch, world) if args.torch else None
    found = rows(comms, gloo, world, args.largest * 2**20)
    if world.rank == 0:
        result = {"ranks": world.size, "machine": here, "window_mb": args.window_mb, "rows": found}
        args.results.mkdir(parents=True, exist_ok=True)
        stem = args.results / f"{here['date'].split()[0]}-{world.size}"
        stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        stem.with_suffix(".txt").write_text(text(result))
        print(text(result), end="")
    if gloo:
        gloo.stop()
    for comm in comms.values():
        comm.close()


if __name__ == "__main__":
    main()
