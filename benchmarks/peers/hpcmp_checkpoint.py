"""hpcmp's side of ``benchmarks/checkpoint.py``: its checkpoints; the same bytes written to plain files, one a rank; and
all gathered by rank 0, which writes them with h5py."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import hpcmp
from benchmarks import common
from benchmarks.peers.tensors import index, tensors, timed, values
from hpcmp.checkpoint import Slab, Storage, open_checkpoint, save
from hpcmp.checkpoint.slab import BLOCK
from hpcmp.comm.detect import start_mpi
from hpcmp.comm.mesh import Mesh


class Bench:
    """One rank: its arrays, and what is done with them."""

    def __init__(self, hidden: int, blocks: int, comm: Any, place: Path) -> None:
        self.comm, self.place, self.mesh = comm, place, Mesh(comm, tp=comm.size)
        self.shapes, self.mine = tensors(hidden, blocks), values(hidden, blocks, comm.size, comm.rank)
        self.slabs = [
            Slab(name, shape, index(shape, axis, comm.size, comm.rank), self.mine[name])
            for name, (shape, axis) in self.shapes.items()
        ]
        self.owned = [slab for slab in self.slabs if self.shapes[slab.name][1] is not None or comm.rank == 0]
        self.size = sum(slab.data.nbytes for slab in self.slabs)
        self.targets = [Slab(s.name, s.shape, s.index, np.zeros_like(s.data)) for s in self.slabs]

    def orders(self) -> dict[str, Any]:
        """Name -> what a turn does; each returns seconds."""
        kinds = ["files", "node", "shared"] + ["mpio"] * h5py.get_config().mpi
        saves = {kind: partial(self.save, kind, Storage(kind)) for kind in kinds}
        saves |= {f"files, verify {v}": partial(self.save, f"files-{v}", Storage("files", v)) for v in ("no", "disk")}
        saves |= {"raw": self.save_raw, "gather": self.save_gathered}
        loads = {kind: partial(self.load, kind) for kind in kinds} | {"raw": self.load_raw}
        return {f"save {k}": v for k, v in saves.items()} | {f"load {k}": v for k, v in loads.items()}

    def check(self) -> bool:
        """Whether the last load was right."""
        return all(np.array_equal(a.data, b.data) for a, b in zip(self.targets, self.slabs, strict=True))

    def save(self, name: str, storage: Storage) -> float:
        root = self.place / name
        return self.timed(root, lambda: save(root, 1, self.owned, {}, self.mesh, storage=storage, keep=None))

    def load(self, name: str) -> float:
        root = self.place / name
        for target in self.targets:
            target.data[...] = 0
        return self.timed(root, lambda: open_checkpoint(root, self.mesh).load(self.targets), fresh=False)

    def save_raw(self) -> float:
        def work() -> None:
            self.place.joinpath("raw").mkdir(exist_ok=True)
            with open(self.place / "raw" / f"{self.comm.rank}", "wb", buffering=0) as file:
                for slab in self.owned:
                    view = memoryview(slab.data).cast("B")
                    for at in range(0, len(view), BLOCK):
                        block = view[at : at + BLOCK]
                        while block:
                            block = block[file.write(block) :]
                os.fsync(file.fileno())

        return self.timed(self.place / "raw", work)

    def load_raw(self) -> float:
        owned = {slab.name for slab in self.owned}

        def work() -> None:
            with open(self.place / "raw" / f"{self.comm.rank}", "rb", buffering=0) as file:
                for target in self.targets:
                    view = memoryview(target.data).cast("B")
                    while target.name in owned and view:
                        view = view[file.readinto(view[:BLOCK]) :]

        return self.timed(self.place / "raw", work, fresh=False)

    def save_gathered(self) -> float:
        first = self.comm.rank == 0
        self.place.mkdir(exist_ok=True)

        def work() -> None:
            file = h5py.File(self.place / "gathered.h5", "w") if first else None
            for name, (shape, axis) in self.shapes.items():
                if axis is None:
                    whole = self.mine[name]
                else:
                    parts = np.empty((self.comm.size, *self.mine[name].shape), np.float32) if first else None
                    self.comm.Gather(self.mine[name], parts)
                    whole = np.concatenate(list(parts), axis) if parts is not None else None
                if file:
                    assert whole is not None and whole.shape == shape
                    file[name] = whole
            if file:
                file.close()
                with open(self.place / "gathered.h5", "rb") as done:
                    os.fsync(done.fileno())

        return self.timed(self.place / "gathered.h5", work)

    def timed(self, place: Path, work: Any, fresh: bool = True) -> float:
        if fresh and self.comm.rank == 0 and place.is_file():
            place.unlink()
        return timed(self.comm.Barrier, self.comm.rank == 0, place, work, fresh, self.size)


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--place", type=Path, required=True)
    args = parser.parse_args()
    comm = start_mpi().COMM_WORLD
    base = common.memory()
    bench = Bench(args.hidden, args.blocks, comm, args.place)
    orders = bench.orders()
    orders |= {
        "names": lambda: list(bench.orders()),
        "check": bench.check,
        "bytes": lambda: sum(slab.data.nbytes for slab in bench.owned),
        "software": lambda: f"hpcmp {hpcmp.__version__}, h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}",
    }
    common.serve(os.environ["BENCH_ADDRESS"], comm.rank, common.at_once(lambda i: 0.0), base, orders)


if __name__ == "__main__":
    main()
