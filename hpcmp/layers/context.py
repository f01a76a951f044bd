"""Context parallelism: how attention reaches the positions of a sequence that other ranks hold.

``Ring`` passes blocks of keys and values from rank to rank (Liu, Zaharia and Abbeel, "Ring attention with blockwise
transformers", 2023). ``HeadExchange`` has all ranks of a group trade their positions of all heads for all positions of
their own heads (Jacobs et al., "DeepSpeed-Ulysses", 2023). Both at once: the group exchanges heads inside, and the ring
runs outside, over the positions that a group holds together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import partition
from ..arrays import Array, array_module
from ..collectives import Collective, Total
from ..comm.base import Communicator, Pending
from ..documents import Documents, First
from ..module import Module
from ..wgrad import WGrad
from .parallel import ModelParallel

#: Tags: a block on its way round the ring, and what goes along with it.
BLOCK, SUM = 0, 1


class Ring:
    """The blocks of a sequence, one a rank, on their way round ``comm``; ``length`` is asked for the whole's length.

    The block of a rank is its two pieces of ``partition.zigzag``, an early and a late one, in this order. Of any two
    blocks every query of one needs half of the keys, so that all ranks compute as much in every step of the ring.
    """

    def __init__(self, comm: Communicator, length: Callable[[], int]) -> None:
        self.comm, self.length = comm, length

    def positions(self, peer: int) -> Any:
        """The positions, in the whole sequence, of the block of ``peer``."""
        return partition.zigzag(self.length(), self.comm.size, peer)

    def pair(self, peer: int) -> tuple[slice, slice, bool]:
        """Which of this rank's queries need which keys of ``peer``, as rows of the two blocks, and if causally.

        A block with itself is causal as it lies. Each late piece comes after all early ones, and the late pieces come
        in the opposite order of the early ones: all queries need the early keys of a rank before this one, and none of
        its late keys; the late queries need all keys of a rank after this one, and the early queries none.
        """
        rank, early = self.comm.rank, partition.sizes(self.length(), 2 * self.comm.size)
        if peer == rank:
            return slice(None), slice(None), True
        return (
            (slice(None), slice(0, early[peer]), False)
            if peer < rank
            else (slice(early[rank], None), slice(None), False)
        )

    def first(self, peer: int, begins: NDArray[np.int32]) -> NDArray[np.int64]:
        """The first of the keys of ``pair`` that each query of it sees of its own document, as a row of these keys.

        begins (batch, length): where the document of each position begins. Returns (batch, queries).
        """
        queries, keys, _ = self.pair(peer)
        here, there = self.positions(self.comm.rank)[queries], self.positions(peer)[keys]
        return np.searchsorted(there, begins[:, here])

    def blocks(self, block: Array) -> Iterator[tuple[int, Array]]:
        """(rank, its block), this rank's own first; the next one is on its way while the caller works on one."""
        rank, size = self.comm.rank, self.comm.size
        for step in range(size):
            peer = (rank - step) % size
            coming = self.hop(block, peer, BLOCK) if step < size - 1 else None
            yield peer, block
            if coming is not None:
                block = coming.wait()

    def hop(self, x: Array, peer: int, tag: int) -> Pending:
        """``x``, the rows of the block of ``peer``, goes to the next rank; that of the rank before ``peer`` comes."""
        comm = self.comm
        before, after = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
        rows = len(self.positions((peer - 1) % comm.size))
        sent = comm.send(x, after, tag)
        coming = comm.recv((rows, *x.shape[1:]), x.dtype, before, tag, like=x)

        def finish(_: Any) -> Array:
            sent.wait()
            return coming.wait()

        return Pending(x, (), finish)


def documents(parallel: ModelParallel, begins: NDArray[np.int32], xp: Any) -> Documents:
    """What this rank's layers need of documents that begin at ``begins`` (batch, length), for arrays of ``xp``; the
    cursor is at a sequence of this length."""
    ring, here = Ring(parallel.ring, lambda: begins.shape[1]), parallel.positions()
    return Documents(
        tuple(First.of(ring.first(peer, begins), xp) for peer in range(ring.comm.size)),
        xp.asarray((here - begins[:, here]).T.astype(np.int32)),
    )


class PositionsToHeads(Collective):
    """y_r = the heads ``ranges[r]`` of [x_0, x_1, ...]: x (s, batch, heads, ...) -> y (total, batch, its heads, ...).

    The positions of a rank are its share of ``total``, the whole. Ranges may be empty, of any sizes, and may overlap: a
    head goes to every rank that reads it. They must cover all heads.
    """

    layout = "VV"

    def __init__(self, comm: Communicator, ranges: Sequence[slice], total: Total = None) -> None:
        super().__init__(comm, 0, total)
        self.ranges, self.sizes = list(ranges), [r.stop - r.start for r in ranges]
        self.heads = max(r.stop for r in ranges)

    def start(self, x: Array) -> Pending:
        xp, shares = array_module(x), self.comm.shards(self.length(), len(x))
        mine, rest = self.sizes[self.comm.rank], (x.shape[1], *x.shape[3:])
        by_head = xp.moveaxis(x, 2, 0)
        sent = xp.concatenate(
            [by_head[r].reshape(n * len(x), *rest) for r, n in zip(self.ranges, self.sizes, strict=True)]
        )
        pending = self.comm.all_to_all_v(sent, [n * len(x) for n in self.sizes], [mine * s for s in shares])

        def join(_: Any) -> Array:
            parts = _cut(pending.wait(), [(mine, s, *rest) for s in shares])
            return xp.moveaxis(xp.concatenate(parts, 1), 0, 2)

        return Pending(x, (), join)

    @property
    def T(self) -> Collective:
        return HeadsToPositions(self.comm, self.ranges, self.total)


class HeadsToPositions(PositionsToHeads):
    """The adjoint: x (total, batch, its heads, ...) -> y (s, batch, heads, ...); what several ranks have is summed."""

    def start(self, x: Array) -> Pending:
        xp, shares = array_module(x), self.comm.shards(self.length(), len(x))
        mine, here, rest = self.sizes[self.comm.rank], shares[self.comm.rank], (x.shape[1], *x.shape[3:])
        by_head, ends = xp.moveaxis(x, 2, 0), [sum(shares[: r + 1]) for r in range(len(shares))]
        parts = [by_head[:, end - s : end].reshape(mine * s, *rest) for end, s in zip(ends, shares, strict=True)]
        pending = self.comm.all_to_all_v(
            xp.concatenate(parts), [mine * s for s in shares], [n * here for n in self.sizes]
        )

        def add(_: Any) -> Array:
            y = xp.zeros((self.heads, here, *rest), x.dtype)
            parts = _cut(pending.wait(), [(n, here, *rest) for n in self.sizes])
            for heads, part in zip(self.ranges, parts, strict=True):  # in the order of the ranks: the same in every run
                y[heads] += part
            return xp.moveaxis(y, 0, 2)

        return Pending(x, (), add)

    @property
    def T(self) -> Collective:
        return PositionsToHeads(self.comm, self.ranges, self.total)


class HeadExchange(Module):
    """``inner``, attention of some heads at all positions of a group, made one of all heads at this rank's positions.

    x = (q (s, batch, n, d), kv (s, batch, k, 2, d)) -> o (s, batch, n, d), s this rank's share of ``total`` positions.
    queries and key_values: the heads of each rank of the group, in the numbering of q and of kv.
    """

    def __init__(
        self,
        comm: Communicator,
        queries: Sequence[slice],
        key_values: Sequence[slice],
        total: Total,
        inner: Module,
    ) -> None:
        self.query, self.key_value = PositionsToHeads(comm, queries, total), PositionsToHeads(comm, key_values, total)
        self.inner = inner

    def forward(self, x: tuple[Array, Array]) -> tuple[Array, Any]:
        q, kv = self.query.start(x[0]), self.key_value.start(x[1])
        o, saved = self.inner.forward((q.wait(), kv.wait()))
        return self.query.T(o), saved

    def backward(self, dy: Array, saved: Any, wgrad: WGrad) -> tuple[Array, Array]:
        dq, dkv = self.inner.backward(self.query(dy), saved, wgrad)
        leaving = self.query.T.start(dq), self.key_value.T.start(dkv)
        return leaving[0].wait(), leaving[1].wait()


def _cut(x: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """Consecutive rows of ``x``, whose first axis joins the first two of each shape."""
    parts, end = [], 0
    for shape in shapes:
        start, end = end, end + shape[0] * shape[1]
        parts.append(x[start:end].reshape(shape))
    return parts
