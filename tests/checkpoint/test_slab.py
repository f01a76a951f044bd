"""The arithmetic of regions."""

from __future__ import annotations

import numpy as np
import pytest

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
