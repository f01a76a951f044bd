"""Mixed precision and the loss scale"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from hpcmp.comm.base import Solo
from hpcmp.comm.mesh import Mesh
from hpcmp.optim.base import Optimizer
from hpcmp.parallel.bucket import Bucket
from hpcmp.parallel.buckets import Buckets
from hpcmp.training.engine import Engine
from tests.planted.machinery import Patch, planted
from tests.training.test_precision import (
    assert_an_overflow_on_one_rank_is_one_on_all,
    assert_small_updates_are_not_lost,
    assert_the_gradient_does_not_depend_on_the_scale,
)


@planted(check=assert_an_overflow_on_one_rank_is_one_on_all, ranks=2)
def overflow_not_agreed(patch: Patch) -> None:
    """A rank looks for an overflow in its own part of the gradient, and skips the step alone."""
    right = Buckets.norm

    def norm(self: Any) -> float:
        mesh = self.mesh
        self.mesh = {Mesh.axes: Solo()}
        try:
            return right(self)
        finally:
            self.mesh = mesh

    patch.setattr(Buckets, "norm", norm)


@planted(check=assert_the_gradient_does_not_depend_on_the_scale)
def clipped_before_it_is_unscaled(patch: Patch) -> None:
    """The norm that clipping looks at is that of the scaled gradient."""

    def step(self: Any, rate: float, *, scale: float = 1.0) -> float:
        norm = self.buckets.norm()
        clipped = 1.0 if self.clip is None or norm <= self.clip else self.clip / norm
        self.steps += 1
        self.update(rate, clipped / scale)
        self.buckets.publish()
        return float(norm / scale)

    patch.setattr(Optimizer, "step", step)


@planted(check=assert_the_gradient_does_not_depend_on_the_scale)
def router_losses_not_scaled(patch: Patch) -> None:
    """The loss scale multiplies the loss of the tokens, and not those that layers have of their own."""
    right = Engine._cut

    def cut(self: Any, *args: Any) -> Any:
        made = right(self, *args)
        for batch in made:
            batch.place = dataclasses.replace(batch.place, weight=batch.place.weight / self.loss_scale.scale)
        return made

    patch.setattr(Engine, "_cut", cut)


@planted(check=assert_small_updates_are_not_lost)
def no_master_weights(patch: Patch) -> None:
    """The optimizer moves weights of 16 bits: what is less than half a unit of their last place is lost."""
    right = Bucket.publish

    def publish(self: Any) -> None:
        self.master[...] = self.master.astype(self.dtype)
        right(self)

    patch.setattr(Bucket, "publish", publish)


@planted(check=assert_an_overflow_on_one_rank_is_one_on_all)
def overflow_steps_all_the_same(patch: Patch) -> None:
    """A step whose gradient overflowed changes the weights before it is noticed."""

    def step(self: Any, rate: float, *, scale: float = 1.0) -> float:
        norm = self.buckets.norm() / scale
        self.steps += math.isfinite(norm)
        self.update(rate, 1 / scale)
        self.buckets.publish()
        return float(norm)

    patch.setattr(Optimizer, "step", step)
