"""Causal self-attention with grouped key-value heads, over this rank's heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import kernels, partition
from ..arrays import Array, array_module
from ..cursor import Cursor
from ..module import Module
from ..wgrad import WGrad
from .dropout import attention_mask


@dataclass(frozen=True)
class Heads:
    """Which heads a rank computes: query head i reads key-value head i // (query / key_value).

    Query heads are shared evenly over the ranks, whether or not that cuts a group: a key-value head that several ranks
    read is held by each of them and owned by the first. ``blocks`` are the (query heads, key-value heads) ranges, in
    this rank's own numbering, within which every key-value head serves equally many query heads: three at most.
    """

    query: int
    key_value: int
    ranks: int = 1
    rank: int = 0

    @property
    def group(self) -> int:
        """Query heads to a key-value head."""
        return self.query // self.key_value

    @property
    def queries(self) -> slice:
        """This rank's query heads."""
        return partition.part(self.query, self.ranks, self.rank)

    @property
    def key_values(self) -> slice:
        """The key-value heads that this rank's query heads read."""
        q = self.queries
        return slice(q.start // self.group, -(-q.stop // self.group)) if q.stop > q.start else slice(0, 0)

    @property
    def owned(self) -> slice:
        """The key-value heads of which this rank computes the first query head."""
        q = self.queries
        return slice(-(-q.start // self.group), -(-q.stop // self.group)) if q.stop > q.start else slice(0, 0)

    @property
    def overlaps(self) -> bool:
        """Whether any key-value head is read by several ranks."""
        return any(q.start % self.group for q in partition.split(self.query, self.ranks) if q.stop > q.start)

    def blocks(self) -> list[tuple[slice, slice]]:
        """See the class."""
        q, kv, g = self.queries, self.key_values, self.group
        cuts = sorted({q.start, min(-(-q.start // g) * g, q.stop), max(q.stop // g * g, q.start), q.stop})
        return [
            (slice(a - q.start, b - q.start), slice(a // g - kv.start, -(-b // g) - kv.start))
            for a, b in zip(cuts, cuts[1:], strict=False)
        ]


class Rope(Module):
    """Rotary positions: each pair of a query's and a key's numbers turns by position * theta^(-2i/d).

    x = (q (S, batch, n, d), kv (S, batch, k, 2, d)), whole sequences of this rank's heads; values pass unchanged.
    Su et al., "RoFormer", 2021, equation 15.
    """

    def __init__(self, head_size: int, theta: float = 10000.0) -> None:
        self.head_size, self.theta = head_size, theta

    def forward(self, x: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        return self._turn(x, 1), None

    def backward(self, dy: tuple[Array, Array], saved: None, wgrad: WGrad) -> tuple[Array, Array]:
        return self._turn(dy, -1)

    def _turn(self, x: tuple[Array, Array], sign: int) -> tuple[Array, Array]:
        q, kv = x
        xp, rope = array_module(q), kernels.of(q).rope
        frequency = self.theta ** (-xp.arange(0, self.head_size, 2) / self.head_size)
        angle = xp.arange(q.shape[0])[:, None, None, None] * frequency
        cos, sin = xp.cos(angle).astype(q.dtype), (sign * xp.sin(angle)).astype(q.dtype)
        turned = xp.empty_like(kv)
        turned[..., 0, :], turned[..., 1, :] = rope(kv[..., 0, :], cos, sin), kv[..., 1, :]
        return rope(q, cos, sin), turned


class CausalAttention(Module):
    """o = softmax(q k^T / sqrt(d), keys up to the query's own position) v, with dropout on the probabilities.

    x = (q (S, batch, n, d), kv (S, batch, k, 2, d)) -> o (S, batch, n, d), n and k this rank's heads. Keeps q, kv, o
    and a number per row; backward makes the probabilities again.
    """

    def __init__(self, heads: Heads, cursor: Cursor, dropout: float = 0.0, name: str = "attention") -> None:
        self.heads, self.cursor, self.dropout, self.name = heads, cursor, dropout, name

    def forward(self, x: tuple[Array, Array]) -> tuple[Array, Any]:
        q, kv = x
        k = kernels.of(q)
        place = self.cursor.place
        o, lse = array_module(q).empty_like(q), []
        for qs, ks in self.heads.blocks():
            keep = self._mask(place, q, qs)
            o[:, :, qs], row = k.attention(q[:, :, qs], kv[:, :, ks, 0], kv[:, :, ks, 1], self._scale(q), keep)
            lse.append(row)
        return o, (q, kv, o, lse, place)

    def backward(self, dy: Array, saved: Any, wgrad: WGrad) -> tuple[Array, Array]:
        q, kv, o, lse, place = saved
        k, xp = kernels.of(q), array_module(q)
        dq, dkv = xp.empty_like(q), xp.zeros_like(kv)
        for (qs, ks), row in zip(self.heads.blocks(), lse, strict=True):
            keep = self._mask(place, q, qs)
            dq[:, :, qs], dk, dv = k.attention_backward(
                dy[:, :, qs], q[:, :, qs], kv[:, :, ks, 0], kv[:, :, ks, 1], o[:, :, qs], row, self._scale(q), keep
            )
            dkv[:, :, ks, 0] += dk  # a key-value head may be read from two blocks
            dkv[:, :, ks, 1] += dv
        return dq, dkv

    def _mask(self, place: Any, q: Array, local: slice) -> Array | None:
        first = self.heads.queries.start
        heads = slice(first + local.start, first + local.stop)
        return attention_mask(self.dropout, self.name, self.cursor, place, q.shape[:2], heads, q)

    @staticmethod
    def _scale(q: Array) -> float:
        return float(q.shape[-1] ** -0.5)
