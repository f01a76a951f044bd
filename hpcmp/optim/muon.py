"""Muon: momentum whose matrices are made orthogonal, each one on one rank."""

from __future__ import annotations

from typing import Any

from .. import kernels
from ..arrays import Array
from ..parallel.bucket import Bucket
from ..parallel.buckets import Buckets
from .adamw import AdamW
from .exchange import Exchange


class Muon(AdamW):
    """W <- W - rate (0.2 sqrt(max(rows, columns)) O + decay W), O = orthogonalise(g + momentum m), m <- momentum m + g.

    For the matrices of hidden layers (``Parameter.matrix``: an expert's each by itself); what is none of those, such as
    embeddings, norms and biases, takes AdamW. Jordan et al., "Muon", 2024; the factor, with which one learning rate
    serves both, is that of Liu et al., "Muon is scalable for LLM training", 2025, section 2.2.

    A matrix is sharded over tp, and with ZeRO over replicas: its momentum is where its shards are, and for the step its
    parts go to one rank of the pipeline stage, which makes it orthogonal and sends each holder its part of the result.
    Matrices are shared among the ranks by their cost. Two all-to-alls a round; a round has at most ``round_size``
    numbers a rank, or one matrix.
    """

    round_size = 1 << 24

    def __init__(self, buckets: Buckets, *, momentum: float = 0.95, **settings: Any) -> None:
        self.momentum = momentum
        super().__init__(buckets, **settings)
        matrices = [bucket for bucket in buckets.buckets if bucket.parameters[0].matrix]
        self.exchange = Exchange(buckets, matrices, self.round_size)

    def kinds_of(self, bucket: Bucket) -> tuple[str, ...]:
        return ("m",) if bucket.parameters[0].matrix else self.kinds

    def update(self, rate: float, grad_scale: float | Array) -> None:
        ahead = {}
        for bucket, state in self.resident():
            if bucket.parameters[0].matrix:
                k = kernels.of(bucket.master)
                ahead[id(bucket)] = k.nesterov(bucket.grad, state["m"], momentum=self.momentum, grad_scale=grad_scale)
            else:
                self.step_bucket(bucket, state, rate, grad_scale)
        here = rate + 0 * grad_scale  # NaN, so that nothing changes, where that is
        for bucket, part, direction in self.exchange.orthogonal(ahead):
            k, weight = kernels.of(bucket.master), bucket.master[part.place]
            k.descend(weight, direction.reshape(-1), rate=here, decay=self.decay(bucket))
