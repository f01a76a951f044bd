"""hpcmp's side of ``benchmarks/step.py``: one rank of a training step, which waits for orders.

``--export FILE`` instead writes the initial weights, whole, to an .npz file, the same for every layout, and compiles
the kernels: that takes memory of the process that does it, at its first step ever.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

import numpy as np

import hpcmp
from benchmarks import common
from benchmarks.breakdown import breakdown
from benchmarks.common import ADAMW, LAYOUTS, SIZES, Size
from hpcmp import kernels
from hpcmp.kernels import blas
from hpcmp.training.config import Config, with_layout
from hpcmp.training.engine import Engine, mesh_for

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


def configuration(size: Size, layout: str = "serial", microbatch: int | None = None, recompute: str = "none") -> Config:
    """The training run of a size, with a constant learning rate, resolved."""
    model = {key: getattr(size, key) for key in ("hidden", "layers", "heads", "sequence", "vocabulary")}
    optimizer: dict[str, Any] = {**ADAMW, "warmup": 0, "final": 1.0}
    train: dict[str, Any] = {"batch": size.batch, "microbatch": microbatch, "steps": 10**6}
    config = Config.from_dict({"model": model, "train": train, "optimizer": optimizer})
    axes = ",".join(filter(None, [LAYOUTS[layout], f"recompute={recompute}"]))
    return with_layout(config, axes).resolved(ranks=common.ranks(layout))


class Steps:
    """An engine, and the batches of a size."""

    def __init__(
        self,
        size: Size,
        layout: str,
        comm: Intracomm | None,
        microbatch: int | None = None,
        recompute: str = "none",
    ) -> None:
        self.size = size
        config = configuration(size, layout, microbatch, recompute)
        self.engine = Engine(config, mesh_for(config, comm))

    def __call__(self, i: int) -> float:
        """The loss of step i."""
        share = self.engine.share
        inputs, targets = self.size.batch_of(i)
        samples = np.arange(share.start, share.stop)
        return self.engine.step(i, inputs[:, share], targets[:, share], samples).loss


def peak() -> float:
    """See ``common.gemm_peak``."""
    n = 1536
    a, b = np.random.default_rng(0).normal(size=(2, n, n)).astype(np.float32)
    return common.gemm_peak(lambda: kernels.of(a).matmul(a, b), n)


def software() -> str:
    """What computes."""
    compiled = "compiled" if kernels.of(np.empty(0, np.float32)) is not kernels.NUMPY else "NumPy's"
    return f"hpcmp {hpcmp.__version__}, {blas.current() or 'NumPy'}, {compiled} kernels"


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--layout", choices=LAYOUTS, default="serial")
    parser.add_argument("--microbatch", type=int)
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--export")
    args = parser.parse_args()
    size, comm = SIZES[args.size], None
    if common.ranks(args.layout) > 1:
        from hpcmp.comm.detect import start_mpi

        comm = start_mpi().COMM_WORLD
    software()  # loads the libraries that are loaded late
    base = common.memory()
    steps = Steps(size, args.layout, comm, args.microbatch, args.recompute)
    if args.export:
        np.savez(args.export, **{p.name: p.data for p in steps.engine.buckets.parameters})
        Steps(SIZES["XS"], "serial", None)(0)
        return
    orders = {
        "peak": peak,
        "software": software,
        "breakdown": lambda: breakdown(steps, lambda s: Steps(s, args.layout, comm)),
    }
    common.serve(os.environ["BENCH_ADDRESS"], 0 if comm is None else comm.rank, common.at_once(steps), base, orders)


if __name__ == "__main__":
    main()
