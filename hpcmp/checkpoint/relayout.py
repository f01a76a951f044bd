"""A part of an array out of a part of another, in which the same axes lie in another order or share one axis.

The axes of both are words: a letter is an axis that both have, a digit a place on an axis that the other lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from .slab import Region


def fill(
    into: NDArray[Any],
    region: Region,
    here: Sequence[str],
    there: Sequence[str],
    read: Callable[[Region], NDArray[Any]],
) -> None:
    """Set what of ``into``, the part ``region`` of an array of axes ``here``, lies in one of axes ``there``.

    read: from a region of the other array to its numbers; asked for no more than is needed, and not at all where
    ``region`` misses the places that ``here`` names. Every letter is once in each.
    """
    ranges: dict[str, tuple[int, int]] = {}
    place: list[int | slice] = []
    for axis, start, count in zip(here, region.start, region.count, strict=True):
        if not axis.isdigit():
            ranges[axis] = start, count
            place.append(slice(None))
        elif start <= int(axis) < start + count:
            place.append(int(axis) - start)
        else:
            return
    starts, counts = zip(*((int(axis), 1) if axis.isdigit() else ranges[axis] for axis in there), strict=True)
    values = read(Region(starts, counts))
    letters = [axis for axis in there if not axis.isdigit()]
    order = [letters.index(axis) for axis in here if not axis.isdigit()]
    into[tuple(place)] = values.reshape([ranges[axis][1] for axis in letters]).transpose(order)
