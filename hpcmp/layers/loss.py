"""The loss over logits whose vocabulary is sharded."""

from __future__ import annotations

from typing import Any

from .. import kernels
from ..arrays import Array, array_module
from ..comm.base import Communicator
from ..module import Module
from ..wgrad import WGrad
from .parallel import ModelParallel


class VocabularyParallelCrossEntropy(Module):
    """L = sum over positions of (log sum_j exp(x_j) - x_target), x the logits, in nats.

    x = (logits (S, batch, v), targets (S, batch)): v is this rank's share of a vocabulary of any size, targets are
    whole-vocabulary integers; a negative target is ignored. The result is a float64 scalar, the same on every rank of
    tp (and of tp_y, whose ranks have the same logits); the caller divides by the number of tokens, by passing 1/tokens
    as ``dy``. Two collectives of S x batch numbers: the maximum, then the sums. Shoeybi et al., "Megatron-LM", 2019,
    section 3.

    **The backward writes its gradient over the logits**, the largest array of a step, in place of a second one: they
    must be this layer's alone, as the product of a head is that nobody else keeps, and are gone after it.
    """

    def __init__(self, parallel: ModelParallel, vocabulary: int) -> None:
        self.tp: Communicator = parallel.tp
        self.first = self.tp.part(vocabulary).start

    def forward(self, x: tuple[Array, Array]) -> tuple[Array, Any]:
        logits, targets = x
        xp = array_module(logits)
        mine, total, chosen = kernels.of(logits).cross_entropy_parts(logits, targets, self.first)
        top = self.tp.all_reduce(mine, "max").wait()
        total, chosen = self.tp.all_reduce(xp.stack([total * xp.exp(mine - top), chosen])).wait()
        lse = xp.log(total)
        loss = xp.where(targets >= 0, lse - (chosen - top), 0).sum(dtype="float64")
        return loss, (logits, targets, top + lse)

    def backward(self, dy: Any, saved: Any, wgrad: WGrad) -> tuple[Array, None]:
        logits, targets, lse = saved
        scale = (targets >= 0) * lse.dtype.type(dy)  # which 16 bits may not hold
        return kernels.of(logits).cross_entropy_backward(scale, logits, targets, self.first, lse), None
