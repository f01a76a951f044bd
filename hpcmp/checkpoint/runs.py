"""Where a part of an array lies in a file that holds the array in C order: in runs, each one stretch of the file."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .slab import Region


def run_axis(shape: Sequence[int], count: Sequence[int]) -> int:
    """The axis from which on a part of ``count`` elements is one run in a C-order array of ``shape``."""
    axis = len(shape)
    while axis and count[axis - 1] == shape[axis - 1]:
        axis -= 1
    return max(0, axis - 1)


def runs(shape: Sequence[int], region: Region) -> tuple[NDArray[np.int64], int]:
    """Where in an array of ``shape`` the runs of a region begin, in C order, and the length of each: in elements."""
    outer = run_axis(shape, region.count)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    starts = np.array([sum(a * stride for a, stride in zip(region.start, strides, strict=True))], np.int64)
    for n, stride in zip(region.count[:outer], strides[:outer], strict=True):
        starts = np.add.outer(starts, stride * np.arange(n)).reshape(-1)
    return starts, math.prod(region.count[outer:])


def widened(shape: Sequence[int], region: Region, length: int) -> Region:
    """The region, with its last axes taken whole until its runs have ``length`` elements at least.

    To read a little more in one piece is cheaper than to read many small pieces.
    """
    start, count = list(region.start), list(region.count)
    while (axis := run_axis(shape, count)) and math.prod(count[axis:]) < length:
        start[axis], count[axis] = 0, shape[axis]
    return Region(tuple(start), tuple(count))
