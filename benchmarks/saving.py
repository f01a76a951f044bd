"""How long a training run is held up by a checkpoint: saved while it waits, and saved behind its steps.

    python benchmarks/saving.py [--layout serial] [--directory DIR]
    mpirun -n 2 python benchmarks/saving.py --layout dp

The engine of a model with 35 million parameters in float32, 415 MB of weights and moments; ``--layers`` makes it
larger. In each round some steps are taken alone, then a checkpoint is saved synchronously, then one asynchronously
under as many steps as it lasts; what is printed are medians over the rounds. "held up": in calls of the saver, on the
rank where that is longest. "lost": what the steps under the save took longer than as many alone, for whatever reason
(processor, memory, disk).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.common import LAYOUTS, Size
from benchmarks.peers.hpcmp_step import Steps
from hpcmp.checkpoint import Saver
from hpcmp.training.state import save_slabs

SIZE = Size(hidden=768, layers=4, batch=2, sequence=256, vocabulary=8192, heads=12)
ALONE = 4  # steps of a round without a save


class Run:
    """A run that saves in ``directory``, of which each call takes a step."""

    def __init__(self, size: Size, layout: str, comm: Any, directory: Path) -> None:
        self.steps = Steps(size, layout, comm)
        self.engine, self.taken = self.steps.engine, 0
        self.saver = Saver(directory, self.engine.mesh)
        self.engine.before_update = self.saver.settle
        self.saver.prepare(save_slabs(self.engine, "{}"))

    def __call__(self) -> float:
        """The seconds of a step."""
        start = time.perf_counter()
        self.steps(self.taken)
        self.taken += 1
        return time.perf_counter() - start

    def most(self, value: float) -> float:
        """The largest of the ranks' values."""
        return max(self.engine.mesh.gather_objects(value))

    def round(self) -> dict[str, float]:
        """Seconds of a step alone, of a synchronous save, and of an asynchronous one: until it is committed, those held
        up, and those lost; and under how many steps."""
        alone = statistics.mean(self() for _ in range(ALONE))
        waiting = self.saver.save(self.taken, save_slabs(self.engine, "{}"), {})
        start, first = time.perf_counter(), self.taken
        self.saver.begin(self.taken, save_slabs(self.engine, "{}"), {})
        done = None
        while done is None:
            self()
            done = self.saver.poll()
        elapsed, under = time.perf_counter() - start, self.taken - first
        return {
            "step alone": self.most(alone),
            "synchronous": self.most(waiting.held),
            "asynchronous": self.most(done.seconds),
            "steps under it": under,
            "held up": self.most(done.held),
            "lost": self.most(elapsed - under * alone),
        }


def measure(size: Size, layout: str, comm: Any, directory: Path, rounds: int = 3) -> dict[str, float]:
    """The medians of ``round``, after one that does not count; on every rank the same."""
    run = Run(size, layout, comm, directory)
    found = [run.round() for _ in range(1 + rounds)][1:]
    return {key: statistics.median(each[key] for each in found) for key in found[0]}


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=LAYOUTS, default="serial", help="over two ranks, unless serial")
    parser.add_argument("--directory", type=Path, help="where to save: a disk of the kind that is meant")
    parser.add_argument("--layers", type=int, default=SIZE.layers, help="of 85 MB of weights and moments each")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    comm = None
    if common.ranks(args.layout) > 1:
        from hpcmp.comm.detect import start_mpi

        comm = start_mpi().COMM_WORLD
    with tempfile.TemporaryDirectory(dir=args.directory) as own:
        directory = Path(own if comm is None else comm.bcast(own))
        found = measure(replace(SIZE, layers=args.layers), args.layout, comm, directory / "checkpoints", args.rounds)
        if comm is None or comm.rank == 0:
            for key, value in found.items():
                print(f"{key:<16} {value:8.3f}")
            print(f"held up for {100 * found['held up'] / found['synchronous']:.1f} % of a synchronous save")
        if comm is not None:
            comm.Barrier()


if __name__ == "__main__":
    main()
