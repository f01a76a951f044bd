"""Attention and positions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from hpcmp import partition
from hpcmp.layers.attention import Rope
from hpcmp.layers.embedding import LearnedPositions
from hpcmp.layers.heads import Heads
from hpcmp.parallel.buckets import Bucket
from tests.planted.machinery import Patch, after, in_place, planted


@planted("tp=2,sp=0")
def key_value_heads_swapped(patch: Patch) -> None:
    """A rank's query heads read its key-value heads in the opposite order."""
    right = Heads.blocks

    def blocks(self: Heads) -> Any:
        found = right(self)
        return [(q, kv) for (q, _), (_, kv) in zip(found, found[::-1], strict=True)]

    patch.setattr(Heads, "blocks", blocks)


@planted("tp=2,sp=0")
def shared_key_value_gradient_not_summed(patch: Patch) -> None:
    """The gradient of a key-value head that two ranks read is that of a rank's own queries."""
    patch.setattr(Heads, "overlaps", False)


@planted("tp=2,sp=0")
def shared_key_value_gradient_summed_in_place(patch: Patch) -> None:
    """Shards that overlap are summed element by element, as if they were the same slab."""
    after(patch, Bucket, "__init__", lambda self, *_, **__: setattr(self, "overlaps", False))


@planted("tp=2,sp=1", style="llama")
def rotary_positions_restart_on_every_shard(patch: Patch) -> None:
    """The angle of a position is counted from the beginning of the sequence shard that it came from."""
    right = Rope.__init__

    def init(self: Any, parallel: Any, *args: Any) -> None:
        right(self, parallel, *args)
        shares = lambda: partition.sizes(parallel.length(), parallel.tp.size)  # noqa: E731
        self.parallel = SimpleNamespace(context=lambda: np.concatenate([np.arange(n) for n in shares()]))

    patch.setattr(Rope, "__init__", init)


@planted("tp=2,sp=1")
def learnt_positions_restart_on_every_shard(patch: Patch) -> None:
    """The first position of every sequence shard is position 0."""
    in_place(patch, LearnedPositions, lambda x: np.arange(len(x)))
