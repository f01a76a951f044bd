"""PyTorch's side of ``benchmarks/checkpoint.py``: torch.distributed.checkpoint of DTensors over gloo."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from benchmarks import common
from benchmarks.peers.tensors import tensors, timed, values


class Bench:
    """One rank: its tensors, and what is done with them."""

    def __init__(self, hidden: int, blocks: int, ranks: int, rank: int, place: Path) -> None:
        self.rank, self.place = rank, place
        mesh = init_device_mesh("cpu", (ranks,))

        def state(of: Callable[[Any], torch.Tensor]) -> dict[str, DTensor]:
            made = {}
            for name, array in values(hidden, blocks, ranks, rank).items():
                axis = tensors(hidden, blocks)[name][1]
                placement = Replicate() if axis is None else Shard(axis)
                made[name] = DTensor.from_local(of(torch.from_numpy(array)), mesh, [placement], run_check=False)
            return made

        self.size = sum(array.nbytes for array in values(hidden, blocks, ranks, rank).values())
        self.state, self.targets = state(lambda x: x), state(torch.zeros_like)

    def save(self, **options: Any) -> float:
        """Every rank writes what it has, replicated tensors once."""
        writer = dcp.FileSystemWriter(self.place / "dcp", **options)
        return self.timed(lambda: dcp.save(self.state, storage_writer=writer), fresh=True)

    def load(self) -> float:
        """Every rank reads what it has."""
        for target in self.targets.values():
            target.to_local().zero_()
        reader = dcp.FileSystemReader(self.place / "dcp")
        return self.timed(lambda: dcp.load(self.targets, storage_reader=reader), fresh=False)

    def check(self) -> bool:
        """Whether the last load was right."""
        return all(torch.equal(self.targets[name].to_local(), t.to_local()) for name, t in self.state.items())

    def timed(self, work: Callable[[], Any], fresh: bool) -> float:
        """See ``tensors.timed``."""
        return timed(dist.barrier, self.rank == 0, self.place / "dcp", work, fresh, self.size)


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("hidden", "blocks", "ranks", "rank"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--place", type=Path, required=True)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    store = f"file://{args.place}/gloo"
    dist.init_process_group("gloo", init_method=store, rank=args.rank, world_size=args.ranks)
    base = common.memory()
    bench = Bench(args.hidden, args.blocks, args.ranks, args.rank, args.place)
    orders = {
        "save DCP": bench.save,
        "save DCP, 2 threads": lambda: bench.save(thread_count=2),
        "load DCP": bench.load,
        "names": lambda: ["save DCP", "save DCP, 2 threads", "load DCP"],
        "check": bench.check,
        "software": lambda: f"PyTorch {torch.__version__}",
    }
    common.serve(os.environ["BENCH_ADDRESS"], args.rank, common.at_once(lambda i: 0.0), base, orders)


if __name__ == "__main__":
    main()
