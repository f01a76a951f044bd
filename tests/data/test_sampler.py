"""The order of samples: a permutation of the windows every epoch, and a pure function of seed and number."""

from __future__ import annotations

import json
from itertools import permutations

import numpy as np
import pytest
from numpy.typing import NDArray

from hpcmp.data import Sampler, TokenFile
from hpcmp.data.sampler import permute
from hpcmp.errors import DataError, InputError

PRIMES = (5, 7, 31, 127, 257, 1009, 8191)
POWERS = tuple(2**k + d for k in range(1, 15) for d in (-1, 0, 1))


def assert_epoch(starts: NDArray[np.int64], sampler: Sampler) -> None:
    """``starts`` are the windows of one epoch, each once, side by side, and all within the tokens."""
    ordered = np.sort(starts)
    assert len(starts) == sampler.windows
    assert (np.diff(ordered) == sampler.sequence).all()
    assert ordered[0] >= 0
    assert ordered[-1] + sampler.sequence + 1 <= sampler.tokens


@pytest.mark.parametrize("size", sorted({*range(1, 70), *PRIMES, *POWERS}))
def test_permutation_is_a_bijection(size: int) -> None:
    for word in (0, 1, 2**64 - 1):
        np.testing.assert_array_equal(np.sort(permute(np.arange(size), size, word)), np.arange(size))


def test_permutation_of_a_huge_range() -> None:
    size = 2**40 + 1
    x = np.concatenate([np.arange(5000), np.arange(size - 5000, size)])
    y = permute(x, size, 7)
    assert y.min() >= 0 and y.max() < size and len(np.unique(y)) == len(x)
    assert abs(y.mean() / size - 0.5) < 0.02
    np.testing.assert_array_equal(permute(x[::-1][:10], size, 7), y[::-1][:10])  # element by element, no state


@pytest.mark.parametrize("size", [3, 4])
def test_all_orders_come_up_equally(size: int) -> None:
    keys = 4800
    orders = [tuple(permute(np.arange(size), size, word).tolist()) for word in range(keys)]
    count = np.array([orders.count(p) for p in permutations(range(size))])
    expected = keys / len(count)
    assert ((count - expected) ** 2 / expected).sum() < 3 * len(count)  # chi squared; its mean is len(count) - 1


def test_neighbours_do_not_stay_neighbours() -> None:
    y = permute(np.arange(10_000), 10_000, 3)
    assert (np.abs(np.diff(y)) == 1).mean() < 0.002
    assert abs(np.corrcoef(np.arange(10_000), y)[0, 1]) < 0.05


@pytest.mark.parametrize("tokens", [*range(9, 60), 1000, 1001])
def test_every_epoch_passes_over_every_window_once(tokens: int) -> None:
    sampler = Sampler(tokens, sequence=8, seed=1)
    n = sampler.windows
    assert tokens - 1 - n * 8 < 16  # less than two windows are left out
    for epoch in range(6):
        assert_epoch(sampler.starts(np.arange(epoch * n, (epoch + 1) * n)), sampler)


def test_the_check_of_an_epoch_finds_planted_errors() -> None:
    sampler = Sampler(1000, sequence=8, seed=1)
    good = sampler.starts(np.arange(sampler.windows))
    shifted = sampler.starts(np.arange(1, sampler.windows + 1))  # off by one sample, into the next epoch
    twice = np.where(good == good.max(), good.min(), good)
    for bad in (shifted, twice, good + 16, good - 16, good[1:]):
        with pytest.raises(AssertionError):
            assert_epoch(bad, sampler)


def test_epochs_differ_and_their_offsets_reach_every_token() -> None:
    sampler = Sampler(100, sequence=8, seed=0)
    epochs = sampler.starts(np.arange(200 * sampler.windows)).reshape(200, -1)
    assert len({tuple(e) for e in epochs.tolist()}) > 190
    assert {sampler.offset(e) for e in range(200)} == set(range(12))
    seen = np.zeros(100, bool)
    for start in epochs.ravel():
        seen[start : start + 9] = True
    assert seen.all()


def test_seeds_differ() -> None:
    a, b = (Sampler(10_000, 8, seed).batch(0, 100) for seed in (0, 1))
    assert (a != b).mean() > 0.9


def test_batches_are_the_samples_in_order_across_epochs() -> None:
    sampler = Sampler(100, sequence=8, seed=3)  # 11 windows an epoch, batches of 4
    for step in range(12):
        assert sampler.batch(step, 4).tolist() == [sampler.start(n) for n in range(4 * step, 4 * step + 4)]


def test_the_order_is_the_same_in_every_version() -> None:
    """A run may be resumed by a later version, so these numbers must never change."""
    sampler = Sampler(1000, sequence=10, seed=42)
    assert sampler.starts(np.array([0, 1, 2, 98, 99, 10**9])).tolist() == PINNED


PINNED = [969, 179, 439, 949, 374, 361]


def test_one_window() -> None:
    sampler = Sampler(9, sequence=8, seed=0)
    assert sampler.batch(0, 5).tolist() == [0] * 5


def test_too_few_tokens(token_file: TokenFile) -> None:
    split = token_file.split("valid")
    assert Sampler.over(split, len(split) - 1, 0).windows == 1
    with pytest.raises(DataError, match=rf"corpus.h5: valid has {len(split)} tokens.* needs {len(split) + 1}"):
        Sampler.over(split, len(split), 0)
    with pytest.raises(InputError, match="sequence length must be at least 1"):
        Sampler(10, 0, 0)


@pytest.mark.parametrize("count", [1, 2, 7, 100, 124, 125, 1000])
def test_held_out_windows_are_spread_evenly(count: int) -> None:
    sampler = Sampler(1001, sequence=8, seed=0)  # 125 windows
    starts = sampler.held_out(count)
    assert len(starts) == min(count, 125) and (starts % 8 == 0).all()
    assert starts[0] == 0 and starts[-1] + 9 <= 1001
    assert starts[-1] >= 8 * (124 - 125 / count)  # up to the end
    gaps = np.diff(starts)
    assert len(gaps) == 0 or (gaps.min() >= 8 and gaps.max() - gaps.min() <= 8)
    np.testing.assert_array_equal(Sampler(1001, 8, seed=5).held_out(count), starts)


def test_state_survives_json() -> None:
    sampler = Sampler(1000, 8, seed=3, digest="abc")
    sampler.samples = 77
    other = Sampler(1000, 8, seed=3, digest="abc")
    other.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert other.samples == 77


@pytest.mark.parametrize(
    ("key", "changed"),
    [
        ("digest", Sampler(1000, 8, 3, "other")),
        ("tokens", Sampler(1001, 8, 3, "abc")),
        ("sequence", Sampler(1000, 16, 3, "abc")),
        ("seed", Sampler(1000, 8, 4, "abc")),
    ],
)
def test_state_of_another_run_is_refused(key: str, changed: Sampler) -> None:
    state = Sampler(1000, 8, 3, "abc").state_dict() | {"samples": 9}
    with pytest.raises(InputError, match=f"cannot resume.*: {key} was"):
        changed.load_state_dict(state)
    assert changed.samples == 0


@pytest.mark.parametrize("samples", [None, -1, "9", 1.5])
def test_damaged_state_is_refused(samples: object) -> None:
    sampler = Sampler(1000, 8, 3)
    with pytest.raises(InputError, match="samples is"):
        sampler.load_state_dict(sampler.state_dict() | {"samples": samples})
