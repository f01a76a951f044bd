"""Mixed precision and the loss scale"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from hpcmp import kernels
from hpcmp.comm.base import Solo
from hpcmp.comm.mesh import Mesh
from hpcmp.kernels import update
from hpcmp.parallel.bucket import Bucket
from hpcmp.training import engine as module
from hpcmp.training import outcome
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
    right = outcome.summed

    def summed(engine: Any, *args: Any) -> Any:
        mesh = engine.mesh
        engine.mesh = {Mesh.axes: Solo()}
        try:
            return right(engine, *args)
        finally:
            engine.mesh = mesh

    patch.setattr(module, "summed", summed)


@planted(check=assert_the_gradient_does_not_depend_on_the_scale)
def clipped_before_it_is_unscaled(patch: Patch) -> None:
    """The norm that clipping looks at is that of the scaled gradient."""

    def clip_factor(sums: Any, factor: Any, *, clip: Any, scale: float) -> None:
        update.clip_factor(sums, factor, clip=clip, scale=1.0)
        factor /= scale

    patch.setattr(kernels.of(np.zeros(0)), "clip_factor", clip_factor)


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

    def clip_factor(sums: Any, factor: Any, *, clip: Any, scale: float) -> None:
        factor[...] = 1 / scale

    patch.setattr(kernels.of(np.zeros(0)), "clip_factor", clip_factor)
