"""Random numbers: the published generator, the same on every layout, and random."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hpcmp import partition, random
from hpcmp.arrays import Array

ONES = 0xFFFFFFFF
# Known answers of philox4x32-10 that Random123 is distributed with: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (np.array([c], np.uint64) for c in counter)
    assert tuple(int(w[0]) for w in random.philox((c0, c1, c2, c3), key)) == words


def test_bits_puts_row_column_and_extra_into_the_counter() -> None:
    counter, key, words = KNOWN[2]
    i, j, block, extra = counter
    found = random.bits(key, np.array(i), np.array(j), slice(4 * block, 4 * block + 4), extra)
    assert found.dtype == np.uint32
    assert tuple(int(w) for w in found) == words
    inside = random.bits(key, np.array(i), np.array(j), slice(4 * block + 1, 4 * block + 3), extra)
    assert tuple(int(w) for w in inside) == words[1:3]


def test_bits_does_not_depend_on_how_it_is_cut_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw() -> tuple[Array, Array]:
        i, j = np.arange(23)[:, None], np.arange(3)
        return random.bits((1, 2), i, j, slice(2, 31), i % 5), random.normal((1, 2), i, j, slice(3, 12))

    whole = draw()
    assert whole[0].shape == (23, 3, 29) and whole[1].shape == (23, 3, 9)
    monkeypatch.setattr(random, "_CHUNK", 20)
    for part, expected in zip(draw(), whole, strict=True):
        np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("seed", range(40))
def test_any_slab_is_the_slice_of_the_whole(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(1, 9, rng.integers(1, 5)))
    bounds = [np.sort(rng.integers(0, n + 1, 2)) for n in shape]  # now and then empty
    index = tuple(slice(int(a), int(b)) for a, b in bounds)
    whole = random.normal_slab((7, seed), shape, tuple(slice(0, n) for n in shape))
    slab = random.normal_slab((7, seed), shape, index)
    assert slab.shape == tuple(s.stop - s.start for s in index)
    np.testing.assert_array_equal(slab, whole[index])


def test_rows_beyond_two_to_the_32_are_rows_of_their_own() -> None:
    shape = (1 << 33, 5)
    slabs = [random.normal_slab((3, 4), shape, (slice(a, a + 4), slice(0, 5))) for a in (0, (1 << 32) - 2, 1 << 32)]
    assert not np.isclose(slabs[0], slabs[2]).any()
    np.testing.assert_array_equal(slabs[1][2:], slabs[2][:2])


def test_normal_numbers_have_the_moments_and_the_distribution() -> None:
    n = 400 * 501
    x = random.normal_slab(random.key(0, "moments"), (400, 501), (slice(0, 400), slice(0, 501))).reshape(-1)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - expected) < 4 * math.sqrt(variance / n)
    cdf = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
    counts = np.bincount((cdf * 64).astype(int), minlength=64)
    chi_square = ((counts - n / 64) ** 2 / (n / 64)).sum()
    assert 63 - 4 * math.sqrt(126) < chi_square < 63 + 4 * math.sqrt(126)


@pytest.mark.parametrize("shift", [(0, 1), (0, 2), (1, 0), (1, 1)])
def test_neighbours_are_independent(shift: tuple[int, int]) -> None:
    x = random.normal_slab((5, 6), (300, 400), (slice(0, 300), slice(0, 400)))
    a, b = x[: 300 - shift[0], : 400 - shift[1]], x[shift[0] :, shift[1] :]
    for f in (lambda v: v, np.square):  # cosine and sine of one pair share a radius: uncorrelated and independent
        assert abs(np.corrcoef(f(a).reshape(-1), f(b).reshape(-1))[0, 1]) < 4 / math.sqrt(a.size)


def test_keys_differ_by_seed_name_and_step() -> None:
    keys = [random.key(s, n, t) for s in (0, 1) for n in ("blocks/0/dropout", "blocks/1/dropout") for t in range(100)]
    assert len(set(keys)) == len(keys)
    assert random.key(0, "a", 1) == random.key(0, "a", 1)
    masks = [random.DropoutMask(0.5, key, np.arange(64), 0, (slice(0, 64),)).keep() for key in keys[:2]]
    assert 0.45 < (masks[0] == masks[1]).mean() < 0.55


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_a_mask_has_its_rate(rate: float) -> None:
    keep = random.DropoutMask(rate, (8, 9), np.arange(500)[:, None], np.arange(2), (slice(0, 200),)).keep()
    assert keep.dtype == bool
    assert abs(keep.mean() - (1 - rate)) <= 4 * math.sqrt(rate * (1 - rate) / keep.size)


def test_the_columns_of_a_mask_are_its_runs() -> None:
    key, i, runs = (8, 9), np.arange(5), (slice(3, 7), slice(7, 7), slice(1, 6))
    found = random.DropoutMask(0.4, key, i, 2, runs, 3)
    words = random.bits(key, i, np.array(2), slice(0, 9), 3)[:, [3, 4, 5, 6, 1, 2, 3, 4, 5]]
    np.testing.assert_array_equal(found.keep(), words >= 0.4 * 2**32)
    np.testing.assert_array_equal(found.scaled(np.float32), found.keep() * np.float32(1 / 0.6))


def test_the_key_of_a_mask_may_be_an_array() -> None:
    """Whose words count when the mask is drawn."""
    keys = (2**32 - 9, 7), (5, 2**31)
    words = np.array(keys[0], np.int64)
    found = random.DropoutMask(0.4, words, np.arange(5), np.array(2), (slice(3, 17),))
    for key in keys:
        words[...] = key
        wanted = random.DropoutMask(0.4, key, np.arange(5), np.array(2), (slice(3, 17),)).keep()
        np.testing.assert_array_equal(found.keep(), wanted)


@pytest.mark.parametrize("parts", [2, 3, 8, 20])
def test_a_mask_does_not_depend_on_the_layout(parts: int) -> None:
    """Sequence, batch, columns and heads cut up among ranks: each evaluates its part alone."""
    s, batch, heads = 13, 4, 5
    samples = np.array([31, 7, 8, 100])

    def mask(t: slice, i: slice, c: slice, h: slice) -> Array:
        rows = np.arange(t.start, t.stop)[:, None, None], samples[i][:, None]
        return random.DropoutMask(0.3, random.key(0, "core", 2), *rows, (c,), np.arange(h.start, h.stop)).keep()

    whole = mask(slice(0, s), slice(0, batch), slice(0, 11), slice(0, heads))
    for part in range(parts):
        t, i, c, h = (partition.part(n, parts, part) for n in (s, batch, 11, heads))
        np.testing.assert_array_equal(mask(t, i, c, h), whole[t, i, h, c])
