"""The PyTorch peer of ``benchmarks/gpu_step.py``: the model of ``torch_step.py`` on one device.

Weights and moments are float32, and with bfloat16 the model runs under autocast, as is usual; the optimizer is fused.
``--compile`` compiles the model with its loss.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from benchmarks import common, devices
from benchmarks.common import Size
from benchmarks.peers.torch_step import GPT, adamw, clip, load


class Steps:
    """A model on ``device``, and the batches of a size."""

    def __init__(self, size: Size, device: str, dtype: str, weights: Mapping[str, np.ndarray], compiled: bool) -> None:
        self.size, self.device, self.dtype = size, torch.device(device), getattr(torch, dtype)
        self.model = GPT(size)
        load(self.model, weights)
        self.model.to(self.device)
        if compiled:
            self.model.compile()
        self.optimizer, self.parameters = adamw(self.model), list(self.model.parameters())

    def __call__(self, i: int) -> float:
        """The loss of step i."""
        inputs, targets = (torch.from_numpy(x.T.copy()).to(self.device) for x in self.size.batch_of(i))
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = self.model(inputs, targets)
        loss.backward()
        clip(self.parameters, self.parameters, False)
        self.optimizer.step()
        return float(loss.detach())

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a GPU."""
        return self.device.type == "cuda"

    def facts(self) -> dict[str, Any]:
        """What computes, on what."""
        name = torch.cuda.get_device_name(self.device) if self.on_gpu else "cpu"
        return {"software": f"torch {torch.__version__}", "device": name}

    def usage(self) -> dict[str, Any]:
        """Bytes of the device that its pool has had at most, and the process."""
        if not self.on_gpu:
            return {"pool": None, "process": common.memory()}
        return {"pool": torch.cuda.max_memory_reserved(), "process": devices.memory()}

    def peak(self) -> float:
        """The best of a few products of large matrices, in FLOP/s."""
        n = 4096 if self.on_gpu else 768
        a = torch.ones((n, n), device=self.device, dtype=self.dtype if self.on_gpu else torch.float32)
        best = 0.0
        for _ in range(5):
            start = time.perf_counter()
            (a @ a)[0, 0].item()
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
        return best


def main() -> None:
    """One process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="the size, in JSON")
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--weights", required=True, help="the .npz file that hpcmp_gpu_step.py writes")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    base = common.memory()
    with np.load(args.weights) as weights:
        steps = Steps(Size(**json.loads(args.model)), args.device, args.dtype, weights, args.compile)
    orders = {
        "facts": steps.facts,
        "usage": steps.usage,
        "peak": steps.peak,
        "launches": lambda: devices.launches(lambda: steps(0)) if steps.on_gpu else None,
    }
    common.serve(os.environ["BENCH_ADDRESS"], 0, steps, base, orders)


if __name__ == "__main__":
    main()
