"""The PyTorch peer of ``benchmarks/gpu_step.py``: the model of ``torch_step.py`` on one device.

With bfloat16 the model's weights are of 16 bits, and the fused optimizer has its own in float32 with gradients and
moments in float32, as hpcmp's; ``--autocast`` instead keeps the weights in float32, of which PyTorch makes 16 bits for
each product. ``--compile`` compiles the model with its loss, by the mode that it names; with ``--cudnn`` attention is
cuDNN's. Nothing in a step waits for the device: tokens leave from pinned memory, and the loss arrives there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import common, devices
from benchmarks.common import Size
from benchmarks.peers.torch_step import GPT, adamw, clip, load

#: Attention by cuDNN, and what it does not take as ever.
CUDNN = [getattr(SDPBackend, name) for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")]


class Steps:
    """A model on ``device``, and the batches of a size. mode: of torch.compile; "" does without."""

    def __init__(
        self,
        size: Size,
        device: str,
        dtype: str,
        weights: Mapping[str, np.ndarray],
        mode: str = "",
        autocast: bool = False,
        cudnn: bool = False,
    ) -> None:
        self.size, self.device, self.autocast = size, torch.device(device), autocast
        self.dtype, self.attention = getattr(torch, dtype), CUDNN if cudnn else None
        self.model = GPT(size)
        load(self.model, weights)
        self.model.to(self.device)
        self.parameters = self.masters = list(self.model.parameters())
        if self.dtype != torch.float32 and not autocast:
            self.masters = [nn.Parameter(p.detach().clone()) for p in self.parameters]
            self.model.to(self.dtype)
            for master in self.masters:
                master.grad = torch.zeros_like(master)
        if mode:
            self.model.compile(mode=mode)
        self.optimizer = adamw(nn.ParameterList(self.masters))

    def begin(self, i: int) -> Callable[[], float]:
        """Queue step i; what waits for it and gives its loss."""
        inputs, targets = (self._there(torch.from_numpy(x.T.copy())) for x in self.size.batch_of(i))
        self.model.zero_grad(set_to_none=True)
        chosen = sdpa_kernel(self.attention, set_priority=True) if self.attention else nullcontext()
        with torch.autocast(self.device.type, self.dtype, enabled=self.autocast), chosen:
            loss = self.model(inputs, targets)
        loss.backward()
        if self.masters is not self.parameters:
            torch._foreach_copy_([p.grad for p in self.masters], [p.grad for p in self.parameters])
        clip(self.masters, self.masters, False)
        self.optimizer.step()
        if self.masters is not self.parameters:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)
        if not self.on_gpu:
            return loss.item
        found, event = torch.empty((), dtype=loss.dtype, pin_memory=True), torch.cuda.Event()
        found.copy_(loss.detach(), non_blocking=True)
        event.record()

        def wait() -> float:
            event.synchronize()
            return found.item()

        return wait

    def _there(self, x: torch.Tensor) -> torch.Tensor:
        return x.pin_memory().to(self.device, non_blocking=True) if self.on_gpu else x

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
    parser.add_argument("--compile", default="", help="a mode of torch.compile")
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--cudnn", action="store_true")
    args = parser.parse_args()
    base, size = common.memory(), Size(**json.loads(args.model))
    with np.load(args.weights) as weights:
        steps = Steps(size, args.device, args.dtype, weights, args.compile, args.autocast, args.cudnn)
    orders = {
        "facts": steps.facts,
        "usage": steps.usage,
        "peak": steps.peak,
        "launches": lambda: devices.launches(lambda: steps.begin(0)()) if steps.on_gpu else None,
    }
    common.serve(os.environ["BENCH_ADDRESS"], 0, steps.begin, base, orders, ahead=int(steps.on_gpu))


if __name__ == "__main__":
    main()
