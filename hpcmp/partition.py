"""How ``n`` things are shared by ``parts`` ranks: contiguous, in order, as even as can be, nothing padded.

    part i holds [offset_i, offset_i + size_i),  size_i = n // parts + (i < n % parts)

Sizes differ by at most one; with fewer things than ranks the last ranks hold none. Every sharded axis of hpcmp
(heads, vocabulary rows, ffn columns, sequence positions, layers, samples) follows this one rule, so that each rank
knows every other rank's share without asking.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def sizes(n: int, parts: int) -> list[int]:
    """The size of every part; they sum to ``n``."""
    return [n // parts + (i < n % parts) for i in range(parts)]


def split(n: int, parts: int) -> list[slice]:
    """Every part as a slice of ``range(n)``."""
    return [part(n, parts, i) for i in range(parts)]


def part(n: int, parts: int, i: int) -> slice:
    """Part ``i`` as a slice of ``range(n)``."""
    small, more = divmod(n, parts)
    start = i * small + min(i, more)
    return slice(start, start + small + (i < more))


def zigzag(n: int, parts: int, i: int) -> NDArray[np.int64]:
    """Part ``i`` of positions that cost a causal layer the more the later they are: an early piece and a late one.

    positions of i = piece i, then piece (2 parts - 1 - i), of ``split(n, 2 * parts)``; all of them for one part
    """
    first, last = part(n, 2 * parts, i), part(n, 2 * parts, 2 * parts - 1 - i)
    return np.concatenate([np.arange(s.start, s.stop) for s in ((first, last) if parts > 1 else (slice(0, n),))])
