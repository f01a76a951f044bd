"""Which part of a parameter a flat shard holds, and the rectangles that such a part is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..arrays import Array
from ..module import Index, Parameter


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop), in C order, of a parameter's local array, and their ``place`` in the bucket's shard.

    It may be empty.
    """

    parameter: Parameter
    start: int
    stop: int
    place: slice

    def cut(self, flat: Array, within: Index) -> Iterator[tuple[Index, Array]]:
        """The rectangles of the piece that lie in ``within``, and for each a view of ``flat``.

        ``within`` and what is yielded are hyperslabs of the whole parameter (``p.owned``: what counts here;
        ``p.index``: all); ``flat`` is an array of the piece, such as ``bucket.master[piece.place]``.
        """
        p = self.parameter
        for local, run in rectangles(p.local_shape, self.start, self.stop):
            here = shifted(local, p.index)
            part = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(here, within, strict=True))
            if all(s.start < s.stop for s in part):
                view = flat[run.start - self.start : run.stop - self.start].reshape([s.stop - s.start for s in here])
                yield part, view[shifted(part, here, -1)]


def shifted(index: Index, by: Index, sign: int = 1) -> Index:
    """``index`` moved by ``sign`` times the place where ``by`` begins."""
    return tuple(slice(s.start + sign * o.start, s.stop + sign * o.start) for s, o in zip(index, by, strict=True))


def rectangles(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[Index, slice]]:
    """Elements [start, stop) of an array's C order as rectangles, each with its own range of that order.

    At most 2 ndim - 1 of them, in order: an incomplete row at each end of each axis but the first, and what is between.
    """
    if start >= stop:
        return
    if not shape:
        yield (), slice(start, stop)
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # whole rows [first, last) of the first axis
    if first > last:  # within one row
        yield from _within(last, shape, start, stop)
        return
    if start < first * inner:
        yield from _within(first - 1, shape, start, first * inner)
    if first < last:
        yield (slice(first, last), *(slice(0, n) for n in shape[1:])), slice(first * inner, last * inner)
    if last * inner < stop:
        yield from _within(last, shape, last * inner, stop)


def _within(row: int, shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[Index, slice]]:
    before = row * math.prod(shape[1:])
    for index, run in rectangles(shape[1:], start - before, stop - before):
        yield (slice(row, row + 1), *index), slice(run.start + before, run.stop + before)
