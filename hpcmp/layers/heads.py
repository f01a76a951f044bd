"""Which attention heads a rank computes, and which key-value heads these read."""

from __future__ import annotations

from dataclasses import dataclass

from .. import partition


@dataclass(frozen=True)
class Heads:
    """Which heads a rank computes: query head i reads key-value head i // (query / key_value).

    Query heads (all, or those ``within``) are shared evenly over the ranks, whether or not that cuts a group: a
    key-value head that several ranks read is held by each of them and owned by the first. ``blocks`` are the (query
    heads, key-value heads) ranges, in this rank's own numbering, within which every key-value head serves equally many
    query heads: three at most.
    """

    query: int
    key_value: int
    ranks: int = 1
    rank: int = 0
    within: slice | None = None

    @property
    def group(self) -> int:
        """Query heads to a key-value head."""
        return self.query // self.key_value

    @property
    def queries(self) -> slice:
        """This rank's query heads."""
        return self._queries(self.rank)

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
        return any(q.start % self.group for q in map(self._queries, range(self.ranks)) if q.stop > q.start)

    def blocks(self) -> list[tuple[slice, slice]]:
        """See the class."""
        q, kv, g = self.queries, self.key_values, self.group
        cuts = sorted({q.start, min(-(-q.start // g) * g, q.stop), max(q.stop // g * g, q.start), q.stop})
        return [
            (slice(a - q.start, b - q.start), slice(a // g - kv.start, -(-b // g) - kv.start))
            for a, b in zip(cuts, cuts[1:], strict=False)
        ]

    def shares(self, ranks: int) -> list[Heads]:
        """This rank's query heads, shared again over ``ranks``."""
        return [Heads(self.query, self.key_value, ranks, r, self.queries) for r in range(ranks)]

    def local(self, share: Heads) -> tuple[slice, slice]:
        """The query heads and the key-value heads of one of ``shares``, in this rank's own numbering."""
        pairs = (share.queries, self.queries.start), (share.key_values, self.key_values.start)
        queries, key_values = (slice(max(0, s.start - first), max(0, s.stop - first)) for s, first in pairs)
        return queries, key_values

    def _queries(self, rank: int) -> slice:
        whole = self.within or slice(0, self.query)
        part = partition.part(whole.stop - whole.start, self.ranks, rank)
        return slice(whole.start + part.start, whole.start + part.stop)
