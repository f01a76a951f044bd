"""Matrices that are sharded over ranks, brought together on one rank each, worked on, and sent back in parts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .. import kernels
from ..arrays import Array
from ..module import Index, Parameter
from ..parallel.bucket import Bucket
from ..parallel.buckets import Buckets
from ..parallel.pieces import shifted
from .parts import Part, parts

_GROUP = ("dp", "cp", "tp_z", "tp_y", "tp")  # the ranks of one pipeline stage: all that hold parts of its matrices


@dataclass
class Matrix:
    """A matrix of a hidden layer: its shape as the parameter's axes, the rank that works on it, and in which round."""

    shape: tuple[int, ...]
    rows: int
    rank: int = 0
    round: int = 0

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns."""
        return math.prod(self.shape[: self.rows]), math.prod(self.shape[self.rows :])

    @property
    def cost(self) -> int:
        """In multiplications, but for a factor."""
        r, c = self.sides
        return r * c * min(r, c)


@dataclass
class Slab:
    """A hyperslab of matrix number ``matrix``."""

    matrix: int
    index: Index

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(s.stop - s.start for s in self.index)


class Exchange:
    """The matrices of some buckets, each assigned to a rank of this pipeline stage, the dearest first to the freest.

    Every rank knows which hyperslabs every other holds and counts: these tables are gathered once.
    """

    def __init__(self, buckets: Buckets, matrices: list[Bucket], round_size: int) -> None:
        self.group = buckets.mesh[_GROUP]
        self.matrices, numbers = _matrices(buckets.parameters)
        _assign(self.matrices, self.group.size, round_size)
        self.parts: list[tuple[Bucket, Part, int]] = [
            (bucket, part, numbers[id(part.parameter), part.matrix]) for bucket in matrices for part in parts(bucket)
        ]
        held = [Slab(number, part.index) for _, part, number in self.parts]
        counted = [
            Slab(number, shifted(part.owned, part.index)) for _, part, number in self.parts if part.owned is not None
        ]
        self.held, self.counted = self._gather(held), self._gather(counted)

    def orthogonal(self, flats: dict[int, Array]) -> Iterator[tuple[Bucket, Part, Array]]:
        """(bucket, part, this rank's part of 0.2 sqrt(max(rows, columns)) orthogonalise(X)) for every part.

        X are the matrices of ``flats``: for each bucket, by its id, a flat array like its shard.
        """
        for now in range(1 + max((m.round for m in self.matrices), default=-1)):
            whole = self._collect(flats, now)
            for number, x in whole.items():
                matrix = self.matrices[number]
                made = kernels.of(x).orthogonalise(x.reshape(matrix.sides))
                whole[number] = (0.2 * max(matrix.sides) ** 0.5 * made).reshape(matrix.shape)
            yield from self._return(whole, flats, now)

    def _collect(self, flats: dict[int, Array], now: int) -> dict[int, Array]:
        """The matrices of this round that this rank works on, whole."""
        mine = [
            (self.matrices[number].rank, part.view(flats[id(bucket)])[part.owned].reshape(-1))
            for bucket, part, number in self.parts
            if part.owned is not None and self.matrices[number].round == now
        ]
        incoming = [self._for(slabs, self.group.rank, now) for slabs in self.counted]
        like = next(iter(flats.values()), np.zeros(0))
        flat = self._all_to_all(mine, [sum(slab.size for slab in slabs) for slabs in incoming], like)
        whole: dict[int, Array] = {}
        at = 0
        for slab in itertools.chain(*incoming):
            shape = [s.stop - s.start for s in slab.index]
            if slab.matrix not in whole:
                whole[slab.matrix] = np.zeros_like(like, shape=self.matrices[slab.matrix].shape)
            whole[slab.matrix][slab.index] = flat[at : at + slab.size].reshape(shape)
            at += slab.size
        return whole

    def _return(
        self, whole: dict[int, Array], flats: dict[int, Array], now: int
    ) -> Iterator[tuple[Bucket, Part, Array]]:
        """Each holder's parts of the matrices of this round."""
        mine = [
            (rank, whole[slab.matrix][slab.index].reshape(-1))
            for rank, slabs in enumerate(self.held)
            for slab in self._for(slabs, self.group.rank, now)
        ]
        wanted = [(b, part, self.matrices[n].rank) for b, part, n in self.parts if self.matrices[n].round == now]
        sizes = [0] * self.group.size
        for _, part, rank in wanted:
            sizes[rank] += part.place.stop - part.place.start
        flat = self._all_to_all(mine, sizes, next(iter(flats.values()), np.zeros(0)))
        at = [sum(sizes[:rank]) for rank in range(self.group.size)]
        for bucket, part, rank in wanted:
            size = part.place.stop - part.place.start
            shape = [s.stop - s.start for s in part.index]
            yield bucket, part, flat[at[rank] : at[rank] + size].reshape(shape)
            at[rank] += size

    def _for(self, slabs: list[Slab], rank: int, now: int) -> list[Slab]:
        """Those of a rank's slabs that belong to matrices which ``rank`` works on in this round."""
        chosen = [(slab, self.matrices[slab.matrix]) for slab in slabs]
        return [slab for slab, matrix in chosen if matrix.rank == rank and matrix.round == now]

    def _all_to_all(self, mine: list[tuple[int, Array]], received: list[int], like: Array) -> Array:
        """Flat arrays to the ranks they are for, in their order; what comes, in the order of ranks."""
        ordered = sorted(mine, key=lambda item: item[0])
        sent = [sum(len(x) for rank, x in ordered if rank == r) for r in range(self.group.size)]
        flat = np.concatenate([like[:0], *(x for _, x in ordered)])
        return self.group.all_to_all_v(flat, sent, received).wait()

    def _gather(self, slabs: list[Slab]) -> list[list[Slab]]:
        """Every rank's slabs."""
        width = 2 * max((len(m.shape) for m in self.matrices), default=0)
        table = np.zeros((len(slabs), 1 + width), np.int64)
        for row, slab in zip(table, slabs, strict=True):
            ends = [end for s in slab.index for end in (s.start, s.stop)]
            row[0], row[1 : 1 + len(ends)] = slab.matrix, ends
        counts = self.group.all_gather(np.array([len(slabs)])).wait().tolist()
        rows = iter(self.group.all_gather_v(table, counts).wait().tolist())
        return [[self._slab(row) for row in itertools.islice(rows, count)] for count in counts]

    def _slab(self, row: list[int]) -> Slab:
        ends = row[1 : 1 + 2 * len(self.matrices[row[0]].shape)]
        return Slab(row[0], tuple(slice(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True)))


def _matrices(parameters: list[Parameter]) -> tuple[list[Matrix], dict[tuple[int, tuple[int, ...]], int]]:
    """Every matrix of a stage's parameters, the same on all of its ranks, and its number by parameter and place."""
    found: list[Matrix] = []
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}
    for p in parameters:
        if p.matrix is not None:
            stack, rows = p.matrix
            for place in itertools.product(*(range(n) for n in p.shape[:stack])):
                numbers[id(p), place] = len(found)
                found.append(Matrix(p.shape[stack:], rows))
    return found, numbers


def _assign(matrices: list[Matrix], ranks: int, round_size: int) -> None:
    """Share the matrices among the ranks by cost, and each rank's among rounds."""
    load, filled = [0] * ranks, [0] * ranks
    for matrix in sorted(matrices, key=lambda m: -m.cost):
        matrix.rank = load.index(min(load))
        load[matrix.rank] += max(1, matrix.cost)
        matrix.round = filled[matrix.rank] // round_size
        filled[matrix.rank] += math.prod(matrix.shape)
