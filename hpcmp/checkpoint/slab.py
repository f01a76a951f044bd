"""Hyperslabs: which part of a global array an array at hand is, and the arithmetic of such parts."""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

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

    def moved(self, origin: Sequence[int]) -> Region:
        """The region in the coordinates of an array whose first element lies at ``origin``."""
        return Region(tuple(a - o for a, o in zip(self.start, origin, strict=True)), self.count)

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
    """ValueError unless the regions, each within ``shape`` and none empty, cover it exactly once.

    They do if their volumes add up to that of the whole, and do so again when a coordinate x lies at a random place
    m(x) on its axis: then what is covered once counts as before, and a gap no longer makes up for an overlap. The
    places are integers modulo a prime of 61 bits, drawn anew each time: whatever the regions are, a set that is no
    tiling passes with a probability of at most 2 axes / 2^61 (a polynomial in the places that is not zero: Schwartz
    and Zippel), and a tiling never fails. Takes time in proportion to regions x axes, however they lie.
    """
    covered, whole = sum(r.size for r in regions), math.prod(shape)
    if covered < whole:
        raise ValueError(f"only {covered} of {whole} elements are there")
    draw = random.Random()  # seeded by the system
    places = [defaultdict[int, int](lambda: draw.getrandbits(61)) for _ in shape]
    parts = [_Part(r, [(m[a + n] - m[a]) % _PRIME for a, n, m in _axes(r, places)]) for r in regions]
    extents = [(m[n] - m[0]) % _PRIME for n, m in zip(shape, places, strict=True)]
    if covered > whole or sum(_product(part.extents) for part in parts) % _PRIME != _product(extents):
        first, second = _meeting(shape, extents, parts)
        raise ValueError(f"{_text(first)} and {_text(second)} overlap")


_PRIME = 2**61 - 1


class _Part(NamedTuple):
    """A region, and how far it extends along each axis by the random places of its ends."""

    region: Region
    extents: list[int]


def _axes(region: Region, places: Sequence[dict[int, int]]) -> Iterator[tuple[int, int, dict[int, int]]]:
    return zip(region.start, region.count, places, strict=True)


def _product(extents: Sequence[int]) -> int:
    product = 1
    for extent in extents:
        product = product * extent % _PRIME
    return product


def _meeting(shape: Sequence[int], extents: Sequence[int], parts: Sequence[_Part]) -> tuple[Region, Region]:
    """Two regions that meet, where the volumes of ``parts`` are at least that of the whole, and one of them is wrong.

    That much is then true of some layer between two coordinates of the first axis, and the parts in it, too: one with
    more than it has room for, else one in which the random volumes are wrong. Within it the same goes for the next
    axis, and so on: what is left at the end shares a point.
    """
    for axis in range(len(shape)):
        room, target = math.prod(shape[axis + 1 :]), _product(extents[axis + 1 :])
        steps: dict[int, tuple[int, int]] = {}  # what begins at a coordinate, less what ends: both volumes
        for region, own in parts:
            begin, count = region.start[axis], region.count[axis]
            volume, drawn = math.prod(region.count[axis + 1 :]), _product(own[axis + 1 :])
            for at, sign in ((begin, 1), (begin + count, -1)):
                old = steps.get(at, (0, 0))
                steps[at] = old[0] + sign * volume, old[1] + sign * drawn
        layer, covered, found = 0, 0, 0
        for at in sorted(steps)[:-1]:
            covered, found = covered + steps[at][0], found + steps[at][1]
            if covered > room:
                layer = at
                break
            if found % _PRIME != target:
                layer = at
        parts = [p for p in parts if p.region.start[axis] <= layer < p.region.start[axis] + p.region.count[axis]]
    return parts[0].region, parts[1].region


def _text(region: Region) -> str:
    return "[" + ", ".join(f"{a}:{a + n}" for a, n in zip(region.start, region.count, strict=True)) + "]"
