"""hpcmp's side of ``benchmarks/gpu_step.py``: a training step on one device, which waits for orders.

``--export FILE`` instead writes the initial weights in float32 to an .npz file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np

import hpcmp
from benchmarks import common, devices
from benchmarks.common import Size
from benchmarks.peers import hpcmp_step
from hpcmp.arrays import to_host
from hpcmp.training.engine import Engine, mesh_for
from hpcmp.training.metrics import peak_flops


class Steps:
    """An engine on ``device``, and the batches of a size."""

    def __init__(
        self, size: Size, device: str, dtype: str, recompute: str = "none", graphs: bool = False, fp8: Any = "none"
    ) -> None:
        self.size = size
        config = hpcmp_step.configuration(size, recompute=recompute)
        train = dataclasses.replace(config.train, device=device, dtype=dtype, cuda_graphs=graphs, fp8=fp8)
        config = dataclasses.replace(config, train=train)
        self.engine = Engine(config, mesh_for(config, None))
        self.samples = np.arange(size.batch)

    def begin(self, i: int) -> Callable[[], float]:
        """Queue step i; what waits for it and gives its loss."""
        running = self.engine.begin(i, *self.size.batch_of(i), self.samples)
        return lambda: running.result().loss

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a GPU."""
        return self.engine.xp is not np

    def weights(self) -> dict[str, Any]:
        """All of them, by name, in float32."""
        return {p.name: to_host(p.data).astype(np.float32) for p in self.engine.buckets.parameters}

    def facts(self) -> dict[str, Any]:
        """What computes, on what."""
        if not self.on_gpu:
            return {"software": hpcmp_step.software(), "device": "cpu"}
        cuda = self.engine.xp.cuda
        name = cuda.runtime.getDeviceProperties(cuda.Device().id)["name"].decode()
        return {"software": f"hpcmp {hpcmp.__version__}, CuPy {self.engine.xp.__version__}", "device": name}

    def usage(self) -> dict[str, Any]:
        """Bytes of the device that its pool has, and the process."""
        if not self.on_gpu:
            return {"pool": None, "process": common.memory()}
        return {"pool": self.engine.xp.get_default_memory_pool().total_bytes(), "process": devices.memory()}


def main() -> None:
    """One process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="the size, in JSON")
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--fp8", default="none")
    parser.add_argument("--export")
    args = parser.parse_args()
    base = common.memory()
    steps = Steps(Size(**json.loads(args.model)), args.device, args.dtype, args.recompute, args.graphs, args.fp8)
    if args.export:
        np.savez(args.export, **steps.weights())
        return
    orders = {
        "facts": steps.facts,
        "usage": steps.usage,
        "peak": lambda: peak_flops(steps.engine.xp, steps.engine.dtype),
        "launches": lambda: devices.launches(lambda: steps.begin(0)()) if steps.on_gpu else None,
    }
    common.serve(os.environ["BENCH_ADDRESS"], 0, steps.begin, base, orders, ahead=int(steps.on_gpu))


if __name__ == "__main__":
    main()
