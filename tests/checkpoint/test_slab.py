"""The arithmetic of regions."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmp.checkpoint import Slab, slab
from hpcmp.checkpoint.slab import Region, check_tiling


@pytest.mark.parametrize("shape", [(), (1,), (1000,), (7, 11, 13), (3, 1, 50, 2), (2, 300)])
@pytest.mark.parametrize("limit", [1, 8, 60, 1000, 10**6])
def test_blocks_follow_one_another_in_c_order(shape, limit, monkeypatch):
    monkeypatch.setattr(slab, "BLOCK", limit)
    whole = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    inner = Region(tuple(n // 3 for n in shape), tuple(n - n // 3 for n in shape))
    blocks = list(inner.blocks(itemsize=4))
    origin = (0,) * len(shape)
    joined = np.concatenate([whole[b.relative(origin)].ravel() for b in blocks])
    np.testing.assert_array_equal(joined, whole[inner.relative(origin)].ravel())
    assert all(b.size * 4 <= max(limit, 4) for b in blocks)


def test_intersection():
    a = Region((0, 4), (3, 4))
    assert a.intersection(Region((2, 0), (5, 5))) == Region((2, 4), (1, 1))
    assert a.intersection(Region((3, 0), (5, 9))) is None
    assert Region((), ()).intersection(Region((), ())) == Region((), ())


def test_tilings():
    quarters = [Region((i, j), (2, 3)) for i in (0, 2) for j in (0, 3)]
    check_tiling((4, 6), quarters)
    check_tiling((), [Region((), ())])
    many = [Region((i,), (1,)) for i in range(700)]
    check_tiling((700,), many)
    with pytest.raises(ValueError, match="18 of 24 elements"):
        check_tiling((4, 6), quarters[1:])
    with pytest.raises(ValueError, match=r"overlap"):  # the right volume, but a hole and an overlap
        check_tiling((4, 6), [*quarters[1:], Region((1, 3), (2, 3))])
    with pytest.raises(ValueError, match=r"\[600:601\].*overlap"):
        check_tiling((700,), [*many[:-1], Region((600,), (1,))])
    with pytest.raises(ValueError, match="overlap"):
        check_tiling((), [Region((), ()), Region((), ())])


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Region]]:
    """A shape of 1 to 4 axes and a tiling of it: cut in two again and again, or about a hole as a pinwheel is."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    regions = [Region((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 12))):
        region = regions.pop(draw(st.integers(0, len(regions) - 1)))
        regions += draw(st.sampled_from([_halves, _pinwheel]))(region, draw)
    return shape, draw(st.permutations(regions))


def _halves(region: Region, draw: st.DrawFn) -> list[Region]:
    axis = draw(st.integers(0, len(region.count) - 1))
    if region.count[axis] == 1:
        return [region]
    cut = draw(st.integers(1, region.count[axis] - 1))
    return [_part(region, {axis: (0, cut)}), _part(region, {axis: (cut, region.count[axis] - cut)})]


def _pinwheel(region: Region, draw: st.DrawFn) -> list[Region]:
    """Five parts of which no straight cut through the whole separates any."""
    axes = [axis for axis, n in enumerate(region.count) if n >= 3][:2]
    if len(axes) < 2:
        return [region]
    (i, n), (j, m) = ((axis, region.count[axis]) for axis in axes)
    places = [
        ((0, n - 1), (0, 1)), ((n - 1, 1), (0, m - 1)), ((1, n - 1), (m - 1, 1)), ((0, 1), (1, m - 1)),
        ((1, n - 2), (1, m - 2)),
    ]  # fmt: skip
    return [_part(region, {i: a, j: b}) for a, b in places]


def _part(region: Region, places: dict[int, tuple[int, int]]) -> Region:
    start = tuple(a + places.get(axis, (0, 0))[0] for axis, a in enumerate(region.start))
    return Region(start, tuple(places.get(axis, (0, n))[1] for axis, n in enumerate(region.count)))


def judged(shape: tuple[int, ...], regions: list[Region]) -> None:
    """Whether ``check_tiling`` says what counting every element says, and names two regions that do meet."""
    counts = np.zeros(shape, int)
    for region in regions:
        counts[region.relative((0,) * len(shape))] += 1
    if (counts == 1).all():
        return check_tiling(shape, regions)
    with pytest.raises(ValueError, match="overlap|only") as caught:
        check_tiling(shape, regions)
    if counts.sum() < counts.size:
        assert str(caught.value) == f"only {counts.sum()} of {counts.size} elements are there"
        return None
    a, b = (
        Region(tuple(x for x, _ in ends), tuple(y - x for x, y in ends))
        for text in re.findall(r"\[(.*?)\]", str(caught.value))
        for ends in [[tuple(map(int, pair.split(":"))) for pair in text.split(", ")]]
    )
    assert a in regions and b in regions and a.intersection(b)
    assert a != b or regions.count(a) > 1
    return None


@settings(max_examples=300, deadline=None)
@given(tilings())
def test_what_tiles_passes(case: tuple[tuple[int, ...], list[Region]]) -> None:
    check_tiling(*case)


@settings(max_examples=600, deadline=None)
@given(tilings(), st.data())
def test_what_does_not_tile_is_named(case: tuple[tuple[int, ...], list[Region]], data: st.DataObject) -> None:
    shape, regions = case
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, len(regions) - 1))
        what = data.draw(st.sampled_from(["move", "again", "lose", "any", "swap"]))
        count = regions[i].count
        if what == "any":
            count = tuple(data.draw(st.integers(1, n)) for n in shape)
        if what in ("move", "any"):  # "move" keeps the volume: a gap makes up for the overlap
            start = tuple(data.draw(st.integers(0, n - c)) for n, c in zip(shape, count, strict=True))
            regions[i] = Region(start, count)
        elif what == "lose" and len(regions) > 1:
            del regions[i]
        else:  # one twice, perhaps in the place of one as large
            equal = [j for j, r in enumerate(regions) if r.size == regions[i].size and j != i]
            if what == "swap" and equal:
                regions[equal[0]] = regions[i]
            else:
                regions.append(regions[i])
    judged(shape, regions)


LARGE = 200_000
GRID = [Region((i, j, k), (1, 2, 3)) for i in range(100) for j in range(0, 100, 2) for k in range(0, 120, 3)]
HOSTILE: dict[str, tuple[tuple[int, ...], Callable[[], list[Region]], str]] = {
    "a grid": ((100, 100, 120), lambda: GRID, ""),
    "a grid, one piece twice for another": ((100, 100, 120), lambda: [*GRID[:-1], GRID[5]], "0:1, 0:2, 15:18"),
    "all meet": ((LARGE, 4), lambda: [Region((i, 0), (LARGE - i, 1 + i % 4)) for i in range(LARGE)], "overlap"),
    "needles of three directions": (
        (800, 800, 800),
        lambda: (
            [
                Region(tuple(place), tuple(800 if a == axis else 1 for a in range(3)))
                for axis in range(3)
                for at in itertools.product(range(axis % 2, 500, 2), repeat=2)
                for place in [[*at[:axis], 0, *at[axis:]]]
            ]
            + [Region((0, 0, 0), (800, 800, 640))]
        ),
        "overlap",
    ),
    "32 axes": (
        (2,) * 32,
        lambda: [Region((*map(int, f"{i:016b}"), *[0] * 16), (*[1] * 16, *[2] * 16)) for i in range(2**16)],
        "",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hundreds_of_thousands_of_pieces(case: str) -> None:
    shape, make, words = HOSTILE[case]
    regions = make()
    assert len(regions) >= 2**16
    if words:
        assert sum(region.size for region in regions) >= math.prod(shape)
        with pytest.raises(ValueError, match=words):
            check_tiling(shape, regions)
    else:
        check_tiling(shape, regions)


@pytest.mark.parametrize("kind", ["tiles", "meets"])
def test_the_work_grows_as_the_pieces(kind: str) -> None:
    """Counted in calls of functions; no array does more of it, for there is none."""

    def calls(n: int) -> int:
        regions = [Region((i if kind == "tiles" else 0, 0), (1 if kind == "tiles" else n, 5)) for i in range(n)]
        count = 0

        def called(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(called)
        try:
            check_tiling((n, 5), regions)
        except ValueError:
            pass
        finally:
            sys.setprofile(None)
        return count

    assert calls(4000) < 2.1 * calls(2000)


@pytest.mark.parametrize(
    ("index", "data", "words"),
    [
        ((slice(0, 2),), np.zeros((2, 3)), "the index has 1 axes"),
        ((slice(0, 2), slice(0, 3)), np.zeros((3, 2)), "the data have shape"),
        ((slice(3, 5), slice(0, 3)), np.zeros((2, 3)), "not a contiguous part"),
        ((slice(0, 4, 2), slice(0, 3)), np.zeros((4, 3)), "not a contiguous part"),
    ],
)
def test_a_slab_that_does_not_fit_itself(index, data, words):
    with pytest.raises(ValueError, match=words):
        Slab("x", (4, 3), index, data).region()


def test_an_empty_slab_has_no_region():
    assert Slab("x", (4, 3), (slice(2, 2), slice(0, 3)), np.zeros((0, 3))).region() is None
