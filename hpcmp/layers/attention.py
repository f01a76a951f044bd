"""Causal self-attention with grouped key-value heads, over this rank's heads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from .. import kernels
from ..arrays import Array, array_module, wide
from ..cursor import Place
from ..documents import First
from ..module import Module
from ..random import DropoutMask
from ..wgrad import WGrad
from .context import SUM, HeadExchange, Ring
from .dropout import attention_mask
from .heads import Heads
from .parallel import ModelParallel

#: A dropout mask for a range of query heads.
Mask = Callable[[slice], DropoutMask | None]


class Rope(Module):
    """Rotary positions: each pair of a query's and a key's numbers turns by position * theta^(-2i/d).

    x = (q (s, batch, n, d), kv (s, batch, k, 2, d)), this rank's heads at its positions, ``parallel.context()``; values
    pass unchanged. Su et al., "RoFormer", 2021, equation 15.

    **Forward and backward write over what they are given**: x must be this layer's alone, as the product of a linear is
    that nobody else keeps, and ``dy`` as attention makes it.
    """

    def __init__(self, parallel: ModelParallel, head_size: int, theta: float = 10000.0) -> None:
        self.parallel, self.head_size, self.theta = parallel, head_size, theta

    def forward(self, x: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        return self._turn(x, 1), None

    def backward(self, dy: tuple[Array, Array], saved: None, wgrad: WGrad) -> tuple[Array, Array]:
        return self._turn(dy, -1)

    def _turn(self, x: tuple[Array, Array], sign: int) -> tuple[Array, Array]:
        q, kv = x
        rope = kernels.of(q).rope
        positions = np.asarray(self.parallel.context(), np.int64).tobytes()
        cos, *sines = _turns(positions, self.head_size, self.theta, q.dtype, array_module(q))
        sin = sines[sign < 0]
        beside = kv.reshape(*kv.shape[:3], 2 * self.head_size)  # keys, of which rope turns all, and values: a view
        return rope(q, cos, sin), rope(beside, cos, sin).reshape(kv.shape)


@functools.lru_cache(maxsize=16)  # every layer of a model has the same, forward and backward, for each length
def _turns(
    positions: bytes, head_size: int, theta: float, dtype: np.dtype[Any], xp: ModuleType
) -> tuple[Array, Array, Array]:
    """cos, sin and -sin of the angles at some positions (int64), each (s, 1, 1, d/2)."""
    frequency = theta ** (-xp.arange(0, head_size, 2) / head_size)
    angle = xp.asarray(np.frombuffer(positions, np.int64))[:, None, None, None] * frequency
    return xp.cos(angle).astype(dtype), xp.sin(angle).astype(dtype), (-xp.sin(angle)).astype(dtype)


def attention_core(heads: Heads, parallel: ModelParallel, dropout: float = 0.0, name: str = "attention") -> Module:
    """``CausalAttention`` over the whole sequence, x = (q, kv) holding this rank's positions of it: ``context()``.

    Over ulysses the ranks exchange heads for positions, over the ring the keys and values travel.
    """
    ulysses, shares = parallel.ulysses, heads.shares(parallel.ulysses.size)
    core = CausalAttention(shares[ulysses.rank], parallel, dropout, name)
    if ulysses.size == 1:
        return core
    queries, key_values = zip(*map(heads.local, shares), strict=True)
    return HeadExchange(ulysses, queries, key_values, lambda: len(parallel.ring_context()), core)


class CausalAttention(Module):
    """o = softmax(q k^T / sqrt(d), keys up to the query's own position) v, with dropout on the probabilities.

    x = (q (s, batch, n, d), kv (s, batch, k, 2, d)) -> o (s, batch, n, d), n and k this rank's heads, s its positions,
    ``parallel.ring_context()``: all of them on a ring of one. The keys and values of the other ranks come round the
    ring, each block on its way while the one before is computed; their gradients follow, a hop behind, and come home
    with the last one. Keeps q, kv, o and a number per row; backward makes the probabilities again. The result depends
    on the size of the ring in rounding alone. Where documents are kept apart (``Place.documents``) a query sees the
    keys of its own alone, and a block of which this rank's queries see none passes by. Liu, Zaharia and Abbeel, 2023,
    algorithm 1, with the positions of a rank as in ``Ring``.
    """

    def __init__(self, heads: Heads, parallel: ModelParallel, dropout: float = 0.0, name: str = "attention") -> None:
        self.heads, self.cursor, self.dropout, self.name = heads, parallel.cursor, dropout, name
        self.ring = Ring(parallel.ring, lambda: parallel.cursor.place.length)
        self.blocks = heads.blocks()
        if dropout:
            self.cursor.draw(name)

    def forward(self, x: tuple[Array, Array]) -> tuple[Array, Any]:
        q, kv = x
        place = self.cursor.place
        for peer, block in self.ring.blocks(kv):
            queries, keys, causal = self.ring.pair(peer)
            first, seen = self._first(place, peer, len(block[keys]))
            if not seen:
                continue
            part, row = self._forward(q[queries], block[keys], causal, self._mask(place, peer, q), first)
            if causal:  # this rank's own block, which comes first
                o, lse = part.astype(self._summing(q), copy=False), row
            else:
                more = part.astype(o.dtype, copy=False), row
                o[queries], lse[..., queries] = kernels.of(o).merge_attention(o[queries], lse[..., queries], *more)
        o = o.astype(q.dtype, copy=False)
        return o, (q, kv, o, lse, place)

    def backward(self, dy: Array, saved: Any, wgrad: WGrad) -> tuple[Array, Array]:
        q, kv, o, lse, place = saved
        carried = None  # the gradient of the block at hand, from the ranks that had it before
        for peer, block in self.ring.blocks(kv):
            queries, keys, causal = self.ring.pair(peer)
            first, seen = self._first(place, peer, len(block[keys]))
            if seen:
                rows = (dy[queries], q[queries], o[queries], lse[..., queries])
                part, gradient = self._backward(*rows, block[keys], causal, self._mask(place, peer, q), first)
            if causal:
                dq, own = part.astype(self._summing(q), copy=False), gradient
                continue
            total = array_module(q).zeros_like(block) if carried is None else carried.wait()
            if seen:
                dq[queries] += part
                total[keys] += gradient
            carried = self.ring.hop(total, peer, SUM)
        return dq.astype(q.dtype, copy=False), own if carried is None else own + carried.wait()

    def _forward(self, q: Array, kv: Array, causal: bool, mask: Mask, first: First | None) -> tuple[Array, Array]:
        """Attention to one block of keys and values, and the log-sum-exp of its rows."""
        k, xp, scale = kernels.of(q), array_module(q), self._scale(q)
        parts: list[tuple[Array, Array]] = [
            k.attention(q[:, :, qs], kv[:, :, ks], scale, mask(qs), causal, first) for qs, ks in self.blocks
        ]
        if len(parts) == 1:  # the usual case: nothing to join
            return parts[0]
        o, lse = xp.empty_like(q), xp.empty((q.shape[1], q.shape[2], q.shape[0]), wide(q.dtype))
        for (qs, _), part in zip(self.blocks, parts, strict=True):
            o[:, :, qs], lse[:, qs] = part
        return o, lse

    def _backward(
        self, dy: Array, q: Array, o: Array, lse: Array, kv: Array, causal: bool, mask: Mask, first: First | None
    ) -> tuple[Array, Array]:
        """This block's part of dq, and the part of its own gradient that these queries make."""
        k, xp = kernels.of(q), array_module(q)
        parts: list[tuple[Array, Array]] = []
        for qs, ks in self.blocks:
            here = (dy[:, :, qs], q[:, :, qs], kv[:, :, ks], o[:, :, qs], lse[:, qs])
            parts.append(k.attention_backward(*here, self._scale(q), mask(qs), causal, first))
        if len(parts) == 1:
            return parts[0]
        dq, dkv = xp.empty_like(q), xp.zeros_like(kv)
        for (qs, ks), (dqs, dks) in zip(self.blocks, parts, strict=True):
            dq[:, :, qs] = dqs
            dkv[:, :, ks] += dks  # a key-value head may be read from two blocks
        return dq, dkv

    def _first(self, place: Place, peer: int, keys: int) -> tuple[First | None, bool]:
        """The first of the keys of ``peer`` that each of this rank's queries sees, and whether any of them sees one.
        This rank's own block counts as seen, also if it is empty."""
        first = place.documents.blocks[peer] if place.documents else None
        return first, peer == self.ring.comm.rank or first is None or first.any(keys)

    def _mask(self, place: Place, peer: int, like: Array) -> Mask:
        """The dropout mask of some of this rank's query heads, for its queries and the keys of ``peer``."""

        def mask(local: slice) -> DropoutMask | None:
            if self.dropout == 0:
                return None
            queries, keys, _ = self.ring.pair(peer)
            positions = self.ring.positions(self.ring.comm.rank)[queries], self.ring.positions(peer)[keys]
            first = self.heads.queries.start
            heads = slice(first + local.start, first + local.stop)
            return attention_mask(self.dropout, self.name, self.cursor, place, *positions, heads, like)

        return mask

    def _summing(self, q: Array) -> np.dtype[Any]:
        """The dtype in which what the blocks of a ring give is added up; alone, there is nothing to add."""
        return wide(q.dtype) if self.ring.comm.size > 1 else q.dtype

    @staticmethod
    def _scale(q: Array) -> float:
        return float(q.shape[-1] ** -0.5)
