"""ZeRO: shards of states, gradients and weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcmp.parallel.bucket import Bucket
from hpcmp.parallel.buckets import Buckets
from hpcmp.parallel.zero import Window
from tests.planted.machinery import Patch, planted


@planted("dp=2,zero=1", bucket_mb=1e-4)
def weights_of_one_bucket_not_gathered(patch: Patch) -> None:
    """After a step the layers of a rank go on with the old weights in the other ranks' shards of one bucket."""
    right = Bucket.publish
    seen: set[int] = set()

    def publish(self: Bucket) -> None:
        if self.decay and id(self) in seen:
            seen.clear()  # of the others, none again
        else:
            seen.add(id(self))
            right(self)

    patch.setattr(Bucket, "publish", publish)


@planted("dp=2,zero=2,micro=2")
def shard_of_a_microbatch_overwrites_the_sum(patch: Patch) -> None:
    """The shard that comes of a reduce-scatter replaces what the microbatches before have left."""

    def collect(self: Bucket) -> None:
        if self._scattering:
            self.grad[...] = self._scattering.pop(0).wait()

    patch.setattr(Bucket, "collect", collect)


@planted("dp=2,zero=2,micro=2")
def only_the_last_microbatch_is_scattered(patch: Patch) -> None:
    """Gradients are dropped with their buffer after each microbatch but the last."""
    right = Bucket.scatter

    def scatter(self: Bucket) -> None:
        if self.missing:
            self.full = None
        right(self)

    patch.setattr(Bucket, "scatter", scatter)


@planted("dp=4,zero=1,zero_group=2")
def copies_of_a_shard_not_summed(patch: Patch) -> None:
    """With two groups of two that share the states, each group sums the gradients of its own samples."""
    patch.setattr(Bucket, "start", lambda self: setattr(self, "pending", []))


@planted("dp=4,zero=2,zero_group=2")
def norm_counts_copies_of_a_shard(patch: Patch) -> None:
    """Each of two groups that share the gradients counts its shards in the norm."""

    def add_squares(self: Buckets, total: Any) -> None:
        total += sum(float(np.square(bucket.grad).sum()) for bucket in self.buckets)

    patch.setattr(Buckets, "add_squares", add_squares)


@planted("dp=2,zero=3")
def weights_of_the_unit_before(patch: Patch) -> None:
    """A block runs with what was gathered for the block before it, as if the two had one buffer."""
    right = Window.move
    last: dict[int, Any] = {}

    def move(self: Window, here: Any, coming: Any) -> None:
        right(self, here, coming)
        for bucket in here:
            data = bucket.data.copy()
            bucket.data[...] = last.get(bucket.size, data)
            last[bucket.size] = data

    patch.setattr(Window, "move", move)


@planted("dp=2,zero=3")
def gathered_weights_kept_over_the_step(patch: Patch) -> None:
    """What is still gathered when the optimizer steps is not let go of: the next forward begins with old weights."""
    patch.setattr(Bucket, "publish", lambda self: None)
