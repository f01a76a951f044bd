"""No way of sharing blocks has a cheaper slowest stage."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmp import partition
from hpcmp.parallel.balance import balance


def stage_costs(counts: tuple[int, ...], costs: list[float], first: float, last: float) -> list[float]:
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    found = [sum(costs[end - n : end]) for end, n in zip(ends, counts, strict=True)]
    found[0] += first
    found[-1] += last
    return found


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.integers(0, 9).map(float), max_size=7),
    st.integers(1, 4),
    st.integers(0, 20).map(float),
    st.integers(0, 20).map(float),
)
def test_no_other_way_is_better(costs: list[float], stages: int, first: float, last: float) -> None:
    counts = balance(costs, stages, first, last)
    assert len(counts) == stages and sum(counts) == len(costs) and min(counts) >= 0
    every = []
    for cuts in combinations_with_replacement(range(len(costs) + 1), stages - 1):
        ends = (0, *cuts, len(costs))
        found = stage_costs(tuple(b - a for a, b in zip(ends, ends[1:], strict=False)), costs, first, last)
        every.append((max(found), sum(c * c for c in found)))
    mine = stage_costs(counts, costs, first, last)
    assert (max(mine), sum(c * c for c in mine)) == min(every)


@pytest.mark.parametrize("stages", range(1, 9))
def test_equal_blocks_are_shared_as_even_as_can_be(stages: int) -> None:
    for blocks in (1, 7, 8, 20):
        assert sorted(balance([2.0] * blocks, stages), reverse=True) == partition.sizes(blocks, stages)


def test_the_ends_have_work_of_their_own() -> None:
    assert balance([1.0] * 12, 4) == (3, 3, 3, 3)
    assert balance([1.0] * 12, 4, last=2.0) == (4, 4, 3, 1)
    assert balance([1.0] * 4, 3, first=9.0, last=9.0) == (0, 4, 0)


def test_many_blocks() -> None:
    assert sum(balance([1.0, 2.0, 1.5] * 40, 32, 3.0, 8.0)) == 120
