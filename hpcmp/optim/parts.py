"""Where the numbers of a flat shard stand: which matrix of which parameter, and which hyperslab of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..arrays import Array
from ..module import Index, Parameter
from ..parallel.bucket import Bucket
from ..parallel.pieces import rectangles, shifted


@dataclass(frozen=True)
class Part:
    """A run of a bucket's shard that is one hyperslab of one matrix.

    matrix: its place in the stack that the parameter is; () where it is none. index: the hyperslab, in the coordinates
    of the matrix. place: the run in the shard. owned: the part of ``index`` that this rank counts, relative to it; None
    if that is nothing.
    """

    parameter: Parameter
    matrix: tuple[int, ...]
    index: Index
    place: slice
    owned: Index | None

    def view(self, flat: Array) -> Array:
        """The run of ``flat``, an array like the shard, in the shape of the hyperslab."""
        return flat[self.place].reshape([s.stop - s.start for s in self.index])


def parts(bucket: Bucket) -> Iterator[Part]:
    """The parts of a bucket's shard, in its order; of copies over replicas only the first counts."""
    counts = bucket.replicas.rank == 0
    for piece in bucket.pieces():
        p, at = piece.parameter, piece.place.start
        for local, _ in rectangles(p.local_shape, piece.start, piece.stop):
            index = shifted(local, p.index)
            stack = p.matrix[0] if p.matrix else 0
            for matrix in itertools.product(*(range(s.start, s.stop) for s in index[:stack])):
                rest = index[stack:]
                size = math.prod(s.stop - s.start for s in rest)
                owned = _owned(p, matrix, rest) if counts else None
                yield Part(p, matrix, rest, slice(at, at + size), owned)
                at += size


def _owned(p: Parameter, matrix: tuple[int, ...], index: Index) -> Index | None:
    stack, owned = p.owned[: len(matrix)], p.owned[len(matrix) :]
    if not all(s.start <= i < s.stop for i, s in zip(matrix, stack, strict=True)):
        return None
    both = [(max(o.start, s.start), min(o.stop, s.stop), s.start) for o, s in zip(owned, index, strict=True)]
    return tuple(slice(a - first, b - first) for a, b, first in both) if all(a < b for a, b, _ in both) else None
