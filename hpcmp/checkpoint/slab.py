"""Hyperslabs: which part of a global array an array at hand is, and the arithmetic of such parts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array

Index = tuple[slice, ...]

BLOCK = 16 << 20  # bytes of a tensor that are in hand at once while it is written, read or checked


@dataclass(frozen=True)
class Region:
    """The hyperslab [start, start + count) of a global array, axis by axis."""

    start: tuple[int, ...]
    count: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.count)

    def intersection(self, other: Region) -> Region | None:
        """What two regions share; None if nothing."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(
            min(a + n, b + m) for a, n, b, m in zip(self.start, self.count, other.start, other.count, strict=True)
        )
        count = tuple(b - a for a, b in zip(start, stop, strict=True))
        return Region(start, count) if all(n > 0 for n in count) else None

    def blocks(self, itemsize: int) -> Iterator[Region]:
        """The region cut into parts of at most BLOCK bytes, whose elements follow one another in its C order."""
        axis, inner = len(self.count), itemsize
        while axis and inner * self.count[axis - 1] <= BLOCK:
            axis -= 1
            inner *= self.count[axis]
        if axis == 0:
            yield self
            return
        axis -= 1  # the axis that is cut: those before it go one by one, those after it whole
        step = max(1, BLOCK // inner)
        outer = [range(a, a + n) for a, n in zip(self.start[:axis], self.count[:axis], strict=True)]
        for place in itertools.product(*outer):
            for at in range(0, self.count[axis], step):
                start = (*place, self.start[axis] + at, *self.start[axis + 1 :])
                count = (*(1 for _ in place), min(step, self.count[axis] - at), *self.count[axis + 1 :])
                yield Region(start, count)

    def relative(self, origin: Sequence[int]) -> Index:
        """The region as an index into an array whose first element lies at ``origin``."""
        return tuple(slice(a - o, a - o + n) for a, n, o in zip(self.start, self.count, origin, strict=True))


@dataclass(frozen=True)
class Slab:
    """This rank's part of a global array.

    name: of the array, the same on all ranks, such as ``model/blocks/7/mlp/up/weight``. shape: of the whole. index: one
    slice an axis, in the whole's coordinates. data: the array of exactly that part, NumPy or CuPy, a strided view or
    not.
    """

    name: str
    shape: tuple[int, ...]
    index: Index
    data: Array

    def region(self) -> Region | None:
        """The part as a Region; None if it is empty. Raises ValueError if shape, index and data do not fit together."""
        if len(self.index) != len(self.shape):
            raise ValueError(f"{self.name}: the index has {len(self.index)} axes, the shape {len(self.shape)}")
        region = Region(tuple(s.start for s in self.index), tuple(max(0, s.stop - s.start) for s in self.index))
        if tuple(self.data.shape) != region.count:
            raise ValueError(f"{self.name}: the data have shape {tuple(self.data.shape)}, the index {region.count}")
        if not region.size:
            return None
        for s, n in zip(self.index, self.shape, strict=True):
            if not 0 <= s.start < s.stop <= n or s.step not in (None, 1):
                raise ValueError(f"{self.name}: {s} is not a contiguous part of an axis of {n}")
        return region


def placeholder(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Slab:
    """The whole of a tensor with no memory for its numbers: for a question that does not look at them."""
    return Slab(name, shape, tuple(slice(0, n) for n in shape), np.broadcast_to(np.empty((), dtype), shape))


def check_tiling(shape: tuple[int, ...], regions: Sequence[Region]) -> None:
    """ValueError unless the regions, each within ``shape``, cover it exactly once: right volume, and no two meet."""
    start = np.array([r.start for r in regions], np.int64).reshape(len(regions), len(shape))
    stop = start + np.array([r.count for r in regions], np.int64).reshape(start.shape)
    for first in range(0, len(regions), 256):
        a, b = start[first : first + 256, None], stop[first : first + 256, None]
        meets: NDArray[np.bool_] = np.all((a < stop) & (start < b), axis=2)
        meets[np.arange(len(meets)), np.arange(first, first + len(meets))] = False  # a region and itself
        if meets.any():
            i, j = np.argwhere(meets)[0]
            raise ValueError(f"{_text(regions[first + i])} and {_text(regions[j])} overlap")
    covered, whole = sum(r.size for r in regions), math.prod(shape)
    if covered != whole:
        raise ValueError(f"only {covered} of {whole} elements are there")


def _text(region: Region) -> str:
    return "[" + ", ".join(f"{a}:{a + n}" for a, n in zip(region.start, region.count, strict=True)) + "]"
