"""The local tier beside ordinary checkpoints: seconds of a save and of a restart, in alternation.

    mpirun -n 2 python benchmarks/local_tier.py --place DIRECTORY [--memory /dev/shm] [--mb 200] [--rounds 5]

Each rank counts as a node, and has ``--mb`` MiB in 64 tensors of its own. DIRECTORY: a place on the disk of the nodes,
for the ordinary checkpoints too, which are faster here, on one machine's disk, than on a parallel file system that is
shared with others. Restarts read from the disk, after the system was told to forget its copy: all that is on the
nodes; or with the directory of the last node lost, whose part then comes from its partner.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from hpcmp.checkpoint import Slab, open_checkpoint, save
from hpcmp.checkpoint.tier import LocalTier
from hpcmp.comm.mesh import Mesh

TENSORS = 64


class Bench:
    """What the ranks of ``mesh`` own, and the three places where it is saved, below ``place`` and ``memory``."""

    def __init__(self, mesh: Mesh, place: Path, memory: Path, mb: float) -> None:
        self.mesh, self.place, self.memory = mesh, place, memory
        self.columns = int(mb * 2**20) // 4 // TENSORS
        self.data = [
            np.random.default_rng([mesh.rank, i]).random((1, self.columns), np.float32) for i in range(TENSORS)
        ]
        self.bytes = 4 * TENSORS * self.columns * mesh.size
        self.tiers = {
            "local, disk": LocalTier(f"{place}/node{{node}}", "run", mesh),
            "local, memory": LocalTier(f"{memory}/node{{node}}", "run", mesh),
        }

    def slabs(self, data: list[Any]) -> list[Slab]:
        """This rank's row of each tensor."""
        rank, shape = self.mesh.rank, (self.mesh.size, self.columns)
        index = slice(rank, rank + 1), slice(0, self.columns)
        return [Slab(f"tensor/{i}", shape, index, array) for i, array in enumerate(data)]

    def round(self, step: int) -> dict[str, float]:
        """Seconds of each save, then of each restart."""
        found = {"save, ordinary": self._timed(lambda: save(self._root, step, self.slabs(self.data), {}, self.mesh))}
        for name, tier in self.tiers.items():
            found[f"save, {name}"] = self._timed(lambda tier=tier: tier.save(step, self.slabs(self.data), {}))
        self._forget()
        found["restart, ordinary"] = self._restart(lambda: open_checkpoint(self._root, self.mesh))
        for name, tier in self.tiers.items():
            self._forget()
            found[f"restart, {name}"] = self._restart(lambda tier=tier: tier.checkpoints()[0])
        if self.mesh.size > 1:
            for name, tier in self.tiers.items():
                self._forget()
                if self.mesh.rank == self.mesh.size - 1:
                    shutil.rmtree(tier.root)
                lost = self._restart(lambda tier=tier: tier.checkpoints()[0])
                found[f"restart, {name}, a node lost"] = lost
        return found

    @property
    def _root(self) -> Path:
        return self.place / "checkpoints"

    def _restart(self, found: Callable[[], Any]) -> float:
        data = [np.zeros_like(array) for array in self.data]
        seconds = self._timed(lambda: found().load(self.slabs(data)))
        if not all(np.array_equal(a, b) for a, b in zip(data, self.data, strict=True)):
            raise SystemExit("what was loaded is not what was saved")
        return seconds

    def _timed(self, work: Callable[[], object]) -> float:
        self.mesh.gather_objects(None)
        start = time.perf_counter()
        if work() is False:
            raise SystemExit("a local save failed: see the warning")
        return max(self.mesh.gather_objects(time.perf_counter() - start))

    def _forget(self) -> None:
        """Have the system forget what it has of the disk in memory."""
        self.mesh.gather_objects(None)
        if self.mesh.rank == 0:
            os.sync()
            for path in self.place.rglob("*.h5"):
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)
        self.mesh.gather_objects(None)


def measure(mesh: Mesh, place: Path, memory: Path, mb: float, rounds: int) -> tuple[int, dict[str, float]]:
    """The bytes of a step, and the medians over the rounds after one that does not count; the same on every rank."""
    bench = Bench(mesh, place, memory, mb)
    found = [bench.round(step) for step in range(1 + rounds)][1:]
    for tier in bench.tiers.values():
        tier.clear()
    return bench.bytes, {name: statistics.median(each[name] for each in found) for name in found[0]}


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", type=Path, help="a directory on the disk that is meant; a temporary one by default")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="a directory in the memory of a node")
    parser.add_argument("--mb", type=float, default=200.0, help="MiB of a rank")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    from hpcmp.comm.detect import start_mpi

    comm = start_mpi().COMM_WORLD
    os.environ["HPCMP_NODES"] = ",".join(map(str, range(comm.size)))
    with tempfile.TemporaryDirectory(dir=args.place) as own, tempfile.TemporaryDirectory(dir=args.memory) as shared:
        place, memory = comm.bcast((Path(own), Path(shared)))
        before = os.getloadavg()
        with Mesh(comm, tp=comm.size) as mesh:
            size, found = measure(mesh, place, memory, args.mb, args.rounds)
        if comm.rank == 0:
            print(f"{comm.size} ranks, {size / 1e6:.0f} MB a step; load of the machine before: {before[0]:.1f}")
            for name, seconds in found.items():
                print(f"{name:<36} {seconds:8.3f} s   {size / seconds / 1e9:6.2f} GB/s")
        comm.Barrier()


if __name__ == "__main__":
    main()
