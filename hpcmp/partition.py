"""How ``n`` things are shared by ``parts`` ranks: contiguous, in order, as even as can be, nothing padded.

    part i holds [offset_i, offset_i + size_i),  size_i = n // parts + (i < n % parts)

Sizes differ by at most one; with fewer things than ranks the last ranks hold none. Every sharded axis of hpcmp
(heads, vocabulary rows, ffn columns, sequence positions, layers, samples) follows this one rule, so that each rank
knows every other rank's share without asking.
"""

from __future__ import annotations

import math

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


def rectangles(shape: tuple[int, ...], start: int, stop: int) -> list[tuple[slice, ...]]:
    """Elements [start, stop) of an array of ``shape``, numbered in C order, as hyperslabs that follow one another.

    At most 2 len(shape) - 1 of them: a first part of a row, whole rows, a last part of a row, and so on inwards. The
    elements of each are one run of the numbering.
    """
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [tuple(slice(start, stop) for _ in shape)]
    width = math.prod(shape[1:])
    first, last = -(-start // width), stop // width  # rows that are whole
    if first > last:  # within one row
        return _within(last, shape, start, stop)
    whole = [(slice(first, last), *(slice(0, n) for n in shape[1:]))] if first < last else []
    return [*_within(first - 1, shape, start, first * width), *whole, *_within(last, shape, last * width, stop)]


def _within(row: int, shape: tuple[int, ...], start: int, stop: int) -> list[tuple[slice, ...]]:
    """``rectangles`` of elements that all lie in one row."""
    before = row * math.prod(shape[1:])
    return [(slice(row, row + 1), *rest) for rest in rectangles(shape[1:], start - before, stop - before)]
