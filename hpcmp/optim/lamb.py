"""LAMB: Adam whose step for each parameter is as long, relative to the parameter, as the learning rate says."""

from __future__ import annotations

from typing import Any

from .. import kernels
from ..arrays import Array, module_for
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

    def update(self, rate: float, grad_scale: float | Array) -> None:
        mesh, buckets = self.buckets.mesh, self.buckets.buckets
        xp = buckets[0].xp if buckets else module_for(mesh.device)
        squares, directions = xp.zeros((2, len(self.numbers))), []  # where the weights are: the host waits for none
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
                    at = self.numbers[part.parameter.name, part.matrix]
                    for row, x in zip(squares, (bucket.master, u), strict=True):
                        k.add_square_sum(row[at : at + 1], part.view(x)[part.owned])
        weights, lengths = xp.sqrt(mesh[Mesh.axes].all_reduce(squares).wait())
        good = (weights > 0) & (lengths > 0)
        ratios = xp.where(good, weights / xp.where(good, lengths, 1), 1.0)
        rates = (rate + 0 * grad_scale) * ratios  # NaN, so that nothing changes, where that is
        for bucket, u, some in zip(buckets, directions, self.parts, strict=True):
            k = kernels.of(bucket.master)
            for part in some:
                at = self.numbers[part.parameter.name, part.matrix]
                k.descend(bucket.master[part.place], u[part.place], rate=rates[at : at + 1], decay=0.0)
