"""Flat ranges as rectangles, and pieces cut to what is owned."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmp.module import Parameter
from hpcmp.parallel.pieces import Piece, rectangles


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    """A shape of up to four axes, perhaps of length zero, and a range of its elements."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    size = math.prod(shape)
    start, stop = sorted((draw(st.integers(0, size)), draw(st.integers(0, size))))
    return shape, start, stop


@given(ranges())
@settings(max_examples=300, deadline=None)
def test_rectangles_are_the_range_in_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    whole = np.arange(math.prod(shape)).reshape(shape)
    found = list(rectangles(shape, start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)
    for index, run in found:
        np.testing.assert_array_equal(whole[index].reshape(-1), np.arange(run.start, run.stop))
    runs = [run for _, run in found]
    assert [i for run in runs for i in range(run.start, run.stop)] == list(range(start, stop))


def test_as_few_rectangles_as_there_can_be() -> None:
    assert len(list(rectangles((4, 4, 4), 1, 63))) == 5
    assert len(list(rectangles((4, 4, 4), 16, 48))) == 1
    assert len(list(rectangles((4, 4, 4), 17, 19))) == 1
    assert list(rectangles((2, 0), 0, 0)) == []
    assert list(rectangles((), 0, 1)) == [((), slice(0, 1))]


@given(st.integers(0, 24), st.integers(0, 24), st.integers(0, 2), st.integers(2, 6))
@settings(max_examples=200, deadline=None)
def test_a_piece_cut_to_what_is_owned(start: int, stop: int, first: int, last: int) -> None:
    """The parameter holds columns 3 to 9 of (4, 12) and owns some of them; what is cut is a view of the flat array."""
    start, stop = sorted((start, stop))
    held, owned = slice(3, 9), slice(3 + first, 3 + last)
    p = Parameter((4, 12), (slice(0, 4), held), owned=(slice(0, 4), owned))
    whole = np.arange(48.0).reshape(4, 12)
    flat = whole[p.index].reshape(-1)[start:stop].copy()
    found = np.zeros((4, 12))
    for index, view in Piece(p, start, stop, slice(0, stop - start)).cut(flat, p.owned):
        np.testing.assert_array_equal(view, whole[index])
        found[index] += 1
        view[...] = -1
    counted = np.zeros((4, 12))
    counted[p.index] = ((np.arange(24) >= start) & (np.arange(24) < stop)).reshape(4, 6)
    counted[:, : owned.start] = counted[:, owned.stop :] = 0
    np.testing.assert_array_equal(found, counted)
    assert (flat == -1).sum() == counted.sum()
