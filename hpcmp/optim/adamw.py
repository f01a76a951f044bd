"""AdamW over flat buckets, with global-norm clipping that is right on every layout."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from .. import kernels
from ..arrays import Array
from ..module import Parameter
from ..parallel.buckets import Buckets


class AdamW:
    """AdamW with decoupled weight decay. Loshchilov and Hutter, "Decoupled weight decay regularization", 2019.

    Parameters whose ``decay`` is false (norms, biases) are not decayed. The moments m and v lie flat beside each
    bucket's data, for this rank's shards alone; copies of a parameter on several ranks take the same step.
    """

    def __init__(
        self,
        buckets: Buckets,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        epsilon: float = 1e-8,
        weight_decay: float = 0.1,
        clip: float | None = 1.0,
    ) -> None:
        self.buckets, self.betas, self.epsilon, self.weight_decay, self.clip = (
            buckets,
            betas,
            epsilon,
            weight_decay,
            clip,
        )
        self.steps = 0
        self.moments = {
            kind: [np.zeros_like(bucket.data) for bucket in buckets.buckets] for kind in ("m", "v")
        }  # NumPy's dispatch makes these CuPy arrays where the data are

    def step(self, rate: float) -> float:
        """One step with the gradients as they are in the buckets; returns their global norm before clipping.

        With norm > clip the gradient is scaled by clip/norm (Pascanu et al., 2013). A norm that is not finite changes
        nothing but is returned, the same on every rank: the caller decides.
        """
        norm = self.buckets.norm()
        if not math.isfinite(norm):
            return norm
        scale = 1.0 if self.clip is None or norm <= self.clip else self.clip / norm
        self.steps += 1
        for bucket, m, v in zip(self.buckets.buckets, self.moments["m"], self.moments["v"], strict=True):
            kernels.of(bucket.data).adamw(
                bucket.data,
                bucket.grad,
                m,
                v,
                step=self.steps,
                rate=rate,
                betas=self.betas,
                epsilon=self.epsilon,
                decay=self.weight_decay if bucket.decay else 0.0,
                grad_scale=scale,
            )
        return norm

    def state(self) -> Iterator[tuple[str, Parameter, Array]]:
        """(kind, parameter, array) for each moment of each parameter: what a checkpoint holds besides ``steps``."""
        for kind, flats in self.moments.items():
            for bucket, flat in zip(self.buckets.buckets, flats, strict=True):
                for p, view in zip(bucket.parameters, bucket.views(flat), strict=True):
                    yield kind, p, view
