"""The optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcmp.layers.parallel import ModelParallel
from hpcmp.parallel.buckets import Buckets
from hpcmp.training import engine
from tests.optim.test_adamw import assert_norms_and_biases_are_not_decayed
from tests.planted.machinery import Patch, planted


def local_square(buckets: Buckets, owned: bool) -> float:
    grads = [p.grad[p.owned_local] if owned else p.grad for p in buckets.parameters]
    return sum(float(np.square(grad).sum()) for grad in grads)


@planted("tp=2,sp=0")
def clipped_by_the_local_norm(patch: Patch) -> None:
    """The norm is that of a rank's own shards."""
    right = engine.summed

    def summed(e: Any, *args: Any) -> Any:
        sums = right(e, *args)
        sums[0] = local_square(e.buckets, True)
        return sums

    patch.setattr(engine, "summed", summed)


@planted("tp=2,sp=0")
def norm_counts_every_copy(patch: Patch) -> None:
    """What every rank of tp holds, norms and biases, is counted once a rank in the norm."""

    def add_squares(self: Buckets, total: Any) -> None:
        total += local_square(self, False)

    patch.setattr(Buckets, "add_squares", add_squares)


@planted("tp=2,sp=0", raises=RuntimeError)
def copies_owned_by_every_rank(patch: Patch) -> None:
    """Every rank of tp says that it owns the norms and biases, which would be written once a rank, too."""
    right = ModelParallel.replicated

    def replicated(self: Any, *shape: int, **kwargs: Any) -> Any:
        made = right(self, *shape, **kwargs)
        made.owned = made.index
        return made

    patch.setattr(ModelParallel, "replicated", replicated)


@planted(check=assert_norms_and_biases_are_not_decayed)
def weight_decay_on_norms_and_biases(patch: Patch) -> None:
    """What is whole on every rank is decayed like a matrix."""
    right = ModelParallel.replicated

    def replicated(self: Any, *shape: int, decay: bool = True, **kwargs: Any) -> Any:
        return right(self, *shape, **kwargs)

    patch.setattr(ModelParallel, "replicated", replicated)
