"""AdamW over flat buckets."""

from __future__ import annotations

from typing import Any

from .. import kernels
from ..arrays import Array
from ..parallel.bucket import Bucket
from ..parallel.buckets import Buckets
from .base import Optimizer


class AdamW(Optimizer):
    """AdamW with decoupled weight decay. Loshchilov and Hutter, "Decoupled weight decay regularization", 2019.

    m and v are the running means of the gradient and of its square; see ``kernels.update.adamw``.
    """

    kinds = ("m", "v")

    def __init__(
        self, buckets: Buckets, *, betas: tuple[float, float] = (0.9, 0.95), epsilon: float = 1e-8, **settings: Any
    ) -> None:
        self.betas, self.epsilon = betas, epsilon
        super().__init__(buckets, **settings)

    def update(self, rate: float, grad_scale: float | Array) -> None:
        for bucket, state in self.resident():
            self.step_bucket(bucket, state, rate, grad_scale)

    def step_bucket(self, bucket: Bucket, state: dict[str, Array], rate: float, grad_scale: float | Array) -> None:
        """AdamW's step of one bucket."""
        kernels.of(bucket.master).adamw(
            bucket.master,
            bucket.grad,
            state["m"],
            state["v"],
            step=self.steps,
            rate=rate,
            betas=self.betas,
            epsilon=self.epsilon,
            decay=self.decay(bucket),
            grad_scale=grad_scale,
            out=bucket.rounding(),
        )
