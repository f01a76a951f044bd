"""The PyTorch peer of ``benchmarks/step.py``: the same model and step, as a user of PyTorch would write them well.

Fused attention (``scaled_dot_product_attention``), fused cross-entropy and AdamW; replicas are DistributedDataParallel,
tensor parallelism is Megatron's (``torch_tensor``), the pipeline runs 1F1B (``torch_pipeline``), all over gloo.
``--compile`` compiles the model, and its loss. The environment that tunes the allocator is set by the driver.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import ADAMW, LAYOUTS, SIZES, Size
from benchmarks.peers import torch_pipeline, torch_tensor


class Block(nn.Module):
    """One transformer block; ``parts`` ranks share its heads and columns."""

    def __init__(self, size: Size, parts: int = 1) -> None:
        super().__init__()
        h, self.heads = size.hidden, size.heads // parts
        column, row = (nn.Linear, nn.Linear) if parts == 1 else (torch_tensor.Column, torch_tensor.Row)
        self.norm1, self.norm2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.qkv, self.out = column(h, 3 * h // parts), row(h // parts, h)
        self.up, self.down = column(h, 4 * h // parts), row(4 * h // parts, h)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # whose backward is one copy
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(o.transpose(1, 2).reshape(batch, length, -1))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Blocks ``first`` to ``last``, with the embedding before block 0, and after the last block the head and the loss:
    tokens or activations (batch, sequence, h) in, activations or the mean loss out."""

    def __init__(self, size: Size, first: int = 0, last: int | None = None, parts: int = 1) -> None:
        super().__init__()
        last = size.layers if last is None else last
        self.begins, self.ends, self.parts = first == 0, last == size.layers, parts
        if self.begins or self.ends:
            self.table = nn.Embedding(size.vocabulary // parts, size.hidden)
        if self.begins:
            self.positions = nn.Embedding(size.sequence, size.hidden)
        self.blocks = nn.ModuleDict({str(i): Block(size, parts) for i in range(first, last)})
        if self.ends:
            self.norm = nn.LayerNorm(size.hidden)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if self.begins:
            embedded = self.table(x) if self.parts == 1 else torch_tensor.embed(self.table.weight, x)
            x = embedded + self.positions.weight[: x.shape[1]]
        for block in self.blocks.values():
            x = block(x)
        if not self.ends:
            return x
        x = self.norm(x).flatten(0, 1)
        if self.parts > 1:
            return torch_tensor.cross_entropy(torch_tensor.column(x, self.table.weight), targets.flatten())
        return F.cross_entropy(F.linear(x, self.table.weight).float(), targets.flatten())


def load(model: GPT, weights: Mapping[str, np.ndarray], rank: int = 0) -> None:
    """Give ``model`` its share of hpcmp's weights (see ``hpcmp_step.py --export``)."""
    parts = model.parts

    def cut(x: np.ndarray, axis: int) -> np.ndarray:
        return np.split(x, parts, axis)[rank]

    def give(to: nn.Module, weight: np.ndarray, bias: np.ndarray | None = None) -> None:
        with torch.no_grad():
            to.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
            if bias is not None:
                to.bias.copy_(torch.from_numpy(np.ascontiguousarray(bias)))

    if model.begins or model.ends:
        give(model.table, cut(weights["embedding/table"], 0))
    if model.begins:
        give(model.positions, weights["positions/weight"])
    if model.ends:
        give(model.norm, weights["norm/weight"], weights["norm/bias"])
    for i, b in model.blocks.items():
        w = {key: weights[f"blocks/{i}/{key}"] for key in _NAMES}
        h = w["attention/out/bias"].size
        q, kv = cut(w["attention/qkv/query"], 1), cut(w["attention/qkv/key_value"], 1)
        qb, kvb = cut(w["attention/qkv/query_bias"], 0), cut(w["attention/qkv/key_value_bias"], 0)
        give(
            b.qkv,
            np.concatenate([part.reshape(h, -1).T for part in (q, kv[:, :, 0], kv[:, :, 1])]),
            np.concatenate([part.reshape(-1) for part in (qb, kvb[:, 0], kvb[:, 1])]),
        )
        give(b.out, cut(w["attention/out/weight"], 0).reshape(-1, h).T, w["attention/out/bias"])
        give(b.up, cut(w["mlp/up/weight"], 1).T, cut(w["mlp/up/bias"], 0))
        give(b.down, cut(w["mlp/down/weight"], 0).T, w["mlp/down/bias"])
        give(b.norm1, w["attention/norm/weight"], w["attention/norm/bias"])
        give(b.norm2, w["mlp/norm/weight"], w["mlp/norm/bias"])


_NAMES = [f"attention/qkv/{of}{kind}" for of in ("query", "key_value") for kind in ("", "_bias")]
_NAMES += [
    f"{layer}/{kind}"
    for layer in ("attention/norm", "attention/out", "mlp/norm", "mlp/up", "mlp/down")
    for kind in ("weight", "bias")
]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW, decaying matrices alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": ADAMW["weight_decay"]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    settings: Any = {"lr": ADAMW["learning_rate"], "betas": ADAMW["betas"], "eps": ADAMW["epsilon"]}
    return torch.optim.AdamW(groups, fused=True, **settings)


def clip(parameters: Iterable[Tensor], counted: Iterable[Tensor], several: bool) -> None:
    """Clip by the norm of the whole gradient, of which ``counted`` are this rank's part."""
    norm = nn.utils.get_total_norm([p.grad for p in counted])
    if several:
        norm = norm**2
        dist.all_reduce(norm)
        norm = norm**0.5
    nn.utils.clip_grads_with_norm_(parameters, ADAMW["clip"], norm)


def stepper(
    size: Size, layout: str, weights: Mapping[str, np.ndarray], compiled: bool, microbatches: int
) -> Callable[[int], float]:
    """A function that runs one training step and returns its loss."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    half = -(-size.layers // 2)
    ends = (None, None) if layout != "pp" else ((0, half), (half, size.layers))[rank]
    model = GPT(size, ends[0] or 0, ends[1], world if layout == "tp" else 1)
    load(model, weights, rank if layout == "tp" else 0)
    if compiled:
        model.compile()
    share = slice(None)
    run: nn.Module = model
    if layout == "dp":
        run = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        share = slice(rank * size.batch // world, (rank + 1) * size.batch // world)
    optimizer, parameters = adamw(model), list(model.parameters())
    counted = parameters
    if layout == "tp" and rank:
        counted = [p for p in parameters if getattr(p, "sharded", False)]
    if layout == "pp" and rank:
        counted = [p for p in parameters if p is not model.table.weight]

    def step(i: int) -> float:
        inputs, targets = (torch.from_numpy(x.T[share].copy()) for x in size.batch_of(i))
        optimizer.zero_grad(set_to_none=True)
        if layout == "pp":
            loss = torch_pipeline.one_f_one_b(model, inputs, targets, microbatches, size.hidden)
            dist.all_reduce(model.table.weight.grad)
        else:
            loss = run(inputs, targets)
            loss.backward()
            loss = loss.detach()
        clip(parameters, counted, layout in ("tp", "pp"))
        optimizer.step()
        if layout in ("dp", "pp"):
            dist.all_reduce(loss)
        return float(loss) / (world if layout == "dp" else 1)

    return step


def peak() -> float:
    """See ``common.gemm_peak``."""
    n = 1536
    a, b = torch.randn(2, n, n)
    return common.gemm_peak(lambda: a @ b, n)


def software() -> str:
    """What computes."""
    blas = "MKL" if torch.backends.mkl.is_available() else "no MKL"
    return f"torch {torch.__version__}, {blas}"


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--layout", choices=LAYOUTS, default="serial")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--microbatches", type=int, default=1, help="of pp")
    parser.add_argument("--weights", required=True, help="the .npz file that hpcmp_step.py writes")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if common.ranks(args.layout) > 1:
        store = f"file://{os.path.dirname(os.environ['BENCH_ADDRESS'])}/store"
        dist.init_process_group("gloo", store, rank=args.rank, world_size=common.ranks(args.layout))
    base = common.memory()
    with np.load(args.weights) as weights:
        step = stepper(SIZES[args.size], args.layout, weights, args.compile, args.microbatches)
    orders = {"peak": peak, "software": software}
    common.serve(os.environ["BENCH_ADDRESS"], args.rank, common.at_once(step), base, orders)


if __name__ == "__main__":
    main()
