"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from typing import Any

from .. import kernels
from ..arrays import Array
from ..parallel.buckets import Buckets
from .base import Optimizer


class SGD(Optimizer):
    """m <- momentum m + g, w <- w - rate (m + decay w). Polyak, 1964; see ``kernels.update.sgd``."""

    kinds = ("m",)

    def __init__(self, buckets: Buckets, *, momentum: float = 0.9, **settings: Any) -> None:
        self.momentum = momentum
        super().__init__(buckets, **settings)

    def update(self, rate: float, grad_scale: float | Array) -> None:
        for bucket, state in self.resident():
            kernels.of(bucket.master).sgd(
                bucket.master,
                bucket.grad,
                state["m"],
                rate=rate,
                momentum=self.momentum,
                decay=self.decay(bucket),
                grad_scale=grad_scale,
            )
