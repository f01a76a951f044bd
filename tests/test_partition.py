"""Partition: contiguous, in order, even to within one, and nothing lost."""

from __future__ import annotations

import numpy as np
import pytest

from hpcmp import partition


@pytest.mark.parametrize("parts", range(1, 13))
@pytest.mark.parametrize("n", [0, 1, 2, 5, 7, 12, 13, 1003])
def test_split_is_numpys_and_tiles_the_range(n: int, parts: int) -> None:
    numbers = np.arange(n)
    shares = [numbers[s] for s in partition.split(n, parts)]
    for share, expected in zip(shares, np.array_split(numbers, parts), strict=True):
        np.testing.assert_array_equal(share, expected)
    np.testing.assert_array_equal(np.concatenate(shares), numbers)


def test_sizes_part_and_split_agree() -> None:
    for n in range(30):
        for parts in range(1, 10):
            sizes, split = partition.sizes(n, parts), partition.split(n, parts)
            assert sum(sizes) == n
            assert max(sizes) - min(sizes) <= 1
            assert sizes == sorted(sizes, reverse=True)
            assert split == [partition.part(n, parts, i) for i in range(parts)]
            assert sizes == [s.stop - s.start for s in split]


def test_with_fewer_things_than_ranks_the_last_have_none() -> None:
    assert partition.split(2, 4) == [slice(0, 1), slice(1, 2), slice(2, 2), slice(2, 2)]


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("n", [0, 1, 3, 8, 13, 32])
def test_zigzag_parts_tile_and_cost_a_causal_layer_the_same(n: int, parts: int) -> None:
    held = [partition.zigzag(n, parts, i) for i in range(parts)]
    np.testing.assert_array_equal(np.sort(np.concatenate(held)), np.arange(n))
    if n % (2 * parts) == 0:
        assert len({int((positions + 1).sum()) for positions in held}) == 1
