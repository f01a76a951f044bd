"""Context parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from hpcmp import partition
from hpcmp.comm.base import Pending
from hpcmp.kernels import CPU
from hpcmp.layers import attention
from hpcmp.layers.attention import Rope
from hpcmp.layers.context import SUM, HeadExchange, HeadsToPositions, PositionsToHeads, Ring
from tests.planted.machinery import Patch, after, planted


@planted("cp=2", sequence=8)
def late_pieces_in_the_order_of_the_early_ones(patch: Patch) -> None:
    """Rank i of the ring holds the pieces i and ring + i of the sequence, and takes them for i and 2 ring - 1 - i."""

    def zigzag(n: int, parts: int, i: int) -> Any:
        pieces = partition.split(n, 2 * parts)
        return np.concatenate([np.arange(s.start, s.stop) for s in (pieces[i], pieces[parts + i])])

    patch.setattr(partition, "zigzag", zigzag)


@planted("cp=3", sequence=12)
def blocks_taken_for_those_of_other_ranks(patch: Patch) -> None:
    """A rank reckons that the ring turns the other way, and masks each block as if it were another rank's."""
    right = Ring.blocks

    def blocks(self: Ring, block: Any) -> Iterator[tuple[int, Any]]:
        for step, (_, here) in enumerate(right(self, block)):
            yield (self.comm.rank + step) % self.comm.size, here

    patch.setattr(Ring, "blocks", blocks)


@planted("cp=2")
def early_queries_see_later_keys(patch: Patch) -> None:
    """Of two blocks that are not the same, every query sees every key."""
    right = Ring.pair
    patch.setattr(Ring, "pair", lambda self, peer: (slice(None), slice(None), right(self, peer)[2]))


@planted("cp=2")
def blocks_averaged(patch: Patch) -> None:
    """The outputs of two blocks are averaged instead of weighted by the sums of their exponentials."""
    patch.setattr(CPU, "merge_attention", lambda o1, lse1, o2, lse2: ((o1 + o2) / 2, np.logaddexp(lse1, lse2)))


@planted("cp=2")
def backward_with_the_sums_of_one_block(patch: Patch) -> None:
    """The log-sum-exp that is kept is that of a rank's own block alone; the forward is right."""
    right = CPU.merge_attention

    def merge(o1: Any, lse1: Any, o2: Any, lse2: Any) -> Any:
        return right(o1, lse1, o2, lse2)[0], lse1

    patch.setattr(CPU, "merge_attention", merge)


@planted("cp=3", sequence=12)
def gradients_come_home_a_hop_early(patch: Patch) -> None:
    """A rank keeps the gradient of the last block that came by, which is the next rank's, as that of its own keys."""
    right = Ring.hop

    def hop(self: Ring, x: Any, peer: int, tag: int) -> Pending:
        last = peer == (self.comm.rank + 1) % self.comm.size
        return Pending(x) if tag == SUM and last else right(self, x, peer, tag)

    patch.setattr(Ring, "hop", hop)


@planted("cp=2")
def gradients_of_travelling_keys_lost(patch: Patch) -> None:
    """A rank keeps the gradient that its own queries give its keys; that of the other ranks does not reach it."""
    right = Ring.hop

    def hop(self: Ring, x: Any, peer: int, tag: int) -> Pending:
        return right(self, x * 0 if tag == SUM else x, peer, tag)

    patch.setattr(Ring, "hop", hop)


@planted("cp=2,ulysses=2")
def exchanged_key_value_gradient_not_summed(patch: Patch) -> None:
    """Of a key-value head that two ranks of ulysses read, the gradient of the first rank's queries alone comes back."""
    right = HeadsToPositions.start

    def start(self: HeadsToPositions, x: Any) -> Pending:
        first, before = self.ranges[self.comm.rank].start, self.ranges[: self.comm.rank]
        x = x.copy()
        x[:, :, : max([0, *(r.stop - first for r in before)])] = 0
        return right(self, x)

    patch.setattr(HeadsToPositions, "start", start)


@planted("cp=2,ulysses=2", heads=4, kv_heads=4)
def heads_exchanged_for_those_of_the_other_rank(patch: Patch) -> None:
    """A rank of ulysses gets the keys and values of the next rank's heads, and sends their gradients likewise."""

    def turn(self: HeadExchange, *_: Any) -> None:
        old = self.key_value
        self.key_value = PositionsToHeads(old.comm, old.ranges[1:] + old.ranges[:1], old.total)

    after(patch, HeadExchange, "__init__", turn)


@planted("cp=2", style="llama")
def rotary_positions_by_local_index(patch: Patch) -> None:
    """The positions that a rank of cp holds are counted from 0."""
    right = Rope.__init__

    def init(self: Any, parallel: Any, *args: Any) -> None:
        right(self, parallel, *args)
        self.parallel = SimpleNamespace(context=lambda: np.arange(parallel.length()))

    patch.setattr(Rope, "__init__", init)


@planted("cp=2", dropout=0.1)
def attention_dropout_by_local_position(patch: Patch) -> None:
    """The mask of a block follows the places of its queries and keys in the block, not in the sequence."""
    right = attention.attention_mask

    def attention_mask(rate: float, name: str, cursor: Any, place: Any, queries: Any, keys: Any, *others: Any) -> Any:
        return right(rate, name, cursor, place, np.arange(len(queries)), np.arange(len(keys)), *others)

    patch.setattr(attention, "attention_mask", attention_mask)
