"""LAMB: Adam whose step for each parameter is as long, relative to the parameter, as the learning rate says."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import kernels
from ..comm.mesh import Mesh
from ..parallel.buckets import Buckets
from .adamw import AdamW
from .parts import parts


class LAMB(AdamW):
    """w <- w - rate * |w| / |u| * u,  u = Adam's direction + decay w. You et al., 2020, algorithm 2, with phi(x) = x.

    |w| and |u| are 2-norms over the whole parameter, however it is sharded (over a matrix of it where the parameter is
    a stack of them, as of experts): two numbers for each are summed over the mesh, in float64. Where |w| or |u| is
    zero, and for parameters that do not decay (norms and biases), the ratio is 1.
    """

    def __init__(self, buckets: Buckets, **settings: Any) -> None:
        super().__init__(buckets, **settings)
        self.parts = [list(parts(bucket)) for bucket in buckets.buckets]
        mine = {(part.parameter.name, part.matrix) for some in self.parts for part in some}
        self.numbers = {key: i for i, key in enumerate(sorted(set().union(*buckets.mesh.gather_objects(mine))))}

    def update(self, rate: float, grad_scale: float) -> None:
        squares, directions = np.zeros((2, len(self.numbers))), []
        for (bucket, state), some in zip(self.resident(), self.parts, strict=True):
            k = kernels.of(bucket.master)
            u = k.adam_update(
                bucket.grad,
                state["m"],
                state["v"],
                step=self.steps,
                betas=self.betas,
                epsilon=self.epsilon,
                grad_scale=grad_scale,
            )
            u += self.decay(bucket) * bucket.master
            directions.append(u)
            for part in some:
                if part.owned is not None and bucket.decay:
                    number = self.numbers[part.parameter.name, part.matrix]
                    squares[0, number] += k.square_sum(part.view(bucket.master)[part.owned])
                    squares[1, number] += k.square_sum(part.view(u)[part.owned])
        weights, lengths = np.sqrt(self.buckets.mesh[Mesh.axes].all_reduce(squares).wait())
        good = (weights > 0) & (lengths > 0)
        ratios = np.where(good, weights / np.where(good, lengths, 1), 1.0)
        for bucket, u, some in zip(self.buckets.buckets, directions, self.parts, strict=True):
            for part in some:
                number = self.numbers[part.parameter.name, part.matrix]
                bucket.master[part.place] -= rate * float(ratios[number]) * u[part.place]
