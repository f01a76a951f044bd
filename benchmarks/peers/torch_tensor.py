"""Tensor parallelism for the PyTorch peer, as Megatron-LM has it: column- and row-parallel linears, vocabulary-parallel
embedding and cross-entropy, as autograd functions over the whole world. The sum of a column-parallel linear's dX runs
under the product of its dW."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function


class _Column(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.biased = b is not None
        return F.linear(x, w, b)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        dx = dy @ w
        work = dist.all_reduce(dx, async_op=True)
        rows = dy.reshape(-1, dy.shape[-1])
        dw = rows.T @ x.reshape(-1, x.shape[-1])
        db = rows.sum(0) if ctx.biased else None
        work.wait()
        return dx, dw, db


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        top = logits.max(-1).values
        dist.all_reduce(top, dist.ReduceOp.MAX)
        probabilities = logits - top[:, None]
        here = targets - dist.get_rank() * logits.shape[-1]
        held = (here >= 0) & (here < logits.shape[-1])
        here = here.clamp(0, logits.shape[-1] - 1)
        chosen = probabilities.gather(1, here[:, None])[:, 0] * held
        total = probabilities.exp_().sum(-1)
        sums = torch.stack([chosen, total])
        dist.all_reduce(sums)
        ctx.save_for_backward(probabilities.div_(sums[1][:, None]), here, held)
        return (sums[1].log() - sums[0]).mean()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        probabilities, here, held = ctx.saved_tensors
        probabilities[torch.arange(len(here)), here] -= held.to(probabilities.dtype)
        return probabilities.mul_(dy / len(here)), None


def column(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x W^T + b, for this rank's rows of W."""
    result: Tensor = _Column.apply(x, w, b)
    return result


def embed(table: Tensor, tokens: Tensor) -> Tensor:
    """The rows of a table of which this rank holds a part."""
    table.sharded = True
    here = tokens - dist.get_rank() * table.shape[0]
    outside = (here < 0) | (here >= table.shape[0])
    rows = F.embedding(here.masked_fill(outside, 0), table).masked_fill(outside[..., None], 0.0)
    result: Tensor = _Sum.apply(rows)
    return result


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean loss over logits of which this rank has a part of the columns."""
    result: Tensor = _CrossEntropy.apply(logits, targets)
    return result


class Column(nn.Linear):
    """This rank's columns of Y = X W + b."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.weight.sharded = self.bias.sharded = True

    def forward(self, x: Tensor) -> Tensor:
        return column(x, self.weight, self.bias)


class Row(nn.Linear):
    """Y = sum over ranks of X W, + b."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.weight.sharded = True

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Sum.apply(F.linear(x, self.weight))
        return result + self.bias
