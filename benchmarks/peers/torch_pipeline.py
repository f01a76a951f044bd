"""1F1B for the PyTorch peer: the schedule of Narayanan et al. (2021) with messages of torch.distributed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def one_f_one_b(model: nn.Module, inputs: Tensor, targets: Tensor, microbatches: int, hidden: int) -> Tensor:
    """One step of this rank's stage; the mean loss on the last rank, zero elsewhere."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    pairs = list(zip(inputs.chunk(microbatches), targets.chunk(microbatches), strict=True))
    kept: list[tuple[Tensor, Tensor]] = []
    sent: list[tuple[Any, Tensor]] = []
    total = torch.zeros(())
    coming: dict[int, tuple[Any, Tensor]] = {}
    expect_forward(coming, 0, pairs, hidden)

    def forward(i: int) -> None:
        nonlocal total
        x = pairs[i][0]
        if rank:
            work, x = coming.pop(i)
            work.wait()
            x.requires_grad_()
            expect_forward(coming, i + 1, pairs, hidden)
        y = model(x, pairs[i][1])
        if rank == last:
            y = y / len(pairs)
            total += y.detach()
        else:
            out = y.detach()
            sent.append((dist.isend(out, rank + 1, tag=2 * i), out))
        kept.append((x, y))

    def backward(i: int) -> None:
        x, y = kept.pop(0)
        dy = None
        if rank != last:
            dy = torch.empty_like(y)
            dist.recv(dy, rank + 1, tag=2 * i + 1)
        torch.autograd.backward(y, dy)
        if rank:
            sent.append((dist.isend(x.grad, rank - 1, tag=2 * i + 1), x.grad))

    ahead = min(last - rank, len(pairs))
    for i in range(ahead):
        forward(i)
    for i in range(len(pairs)):
        if i + ahead < len(pairs):
            forward(i + ahead)
        backward(i)
    for work, _ in sent:
        work.wait()
    return total


def expect_forward(coming: dict[int, Any], i: int, pairs: list[tuple[Tensor, Tensor]], hidden: int) -> None:
    """Begin to receive the input of microbatch i, if there is one and it comes from another rank."""
    if dist.get_rank() and i < len(pairs):
        x = torch.empty(*pairs[i][0].shape, hidden)
        coming[i] = dist.irecv(x, dist.get_rank() - 1, tag=2 * i), x
