"""Masks drawn inside compiled loops: bit for bit those of ``hpcmp.random``, however rows and columns are cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hpcmp import kernels, random
from hpcmp.kernels import reference, threads
from hpcmp.random import DropoutMask
from tests.test_random import KNOWN

pytest.importorskip("numba")

from hpcmp.kernels.compiled import random as compiled  # noqa: E402
from hpcmp.kernels.compiled.jit import jit  # noqa: E402

FOUND = kernels.with_numba()
assert FOUND is not None
COMPILED = FOUND[0]
WORDS = 4 * compiled._COUNTERS


@jit
def _philox(words: NDArray[np.uint32], row: Any, first: int, keys: Any) -> None:
    compiled.philox(words, row, first, keys)


def words(key: tuple[int, int], row: tuple[int, ...], first: int, counters: int) -> NDArray[np.uint32]:
    found = np.empty(4 * counters, np.uint32)
    _philox(found, np.array(row, np.uint32), first, np.array(random.round_keys(key), np.uint32))
    return found


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    i, j, block, extra = counter
    assert tuple(words(key, (i, j, extra), block, 1)) == expected


@pytest.mark.parametrize("counters", [0, 1, 3, 7, 8, 16, 33, 100])
def test_words_are_those_of_bits(counters: int) -> None:
    """Counters in vectors and those left over, of random keys and rows of all 32 bits."""
    rng = np.random.default_rng(counters)
    for _ in range(20):
        k0, k1, i, j, extra = (int(n) for n in rng.integers(0, 1 << 32, 5))
        first = int(rng.integers(0, 1 << 30))
        expected = random.bits((k0, k1), np.array(i), np.array(j), slice(4 * first, 4 * (first + counters)), extra)
        np.testing.assert_array_equal(words((k0, k1), (i, j, extra), first, counters), expected)


def drawn(rng: np.random.Generator) -> tuple[DropoutMask, tuple[int, ...]]:
    """A mask whose runs begin and end anywhere, some empty or longer than what is drawn at once, and its shape."""
    a, b, n = (int(x) for x in rng.integers(0, 5, 3))
    bounds = np.sort(rng.integers(0, WORDS + 99 if rng.random() < 0.2 else 40, (int(rng.integers(1, 4)), 2)), 1)
    i, j, extra = rng.integers(0, 1 << 32, (a, 1, 1)), rng.integers(0, 1 << 32, (b, 1)), rng.integers(0, 9, n)
    key = int(rng.integers(0, 1 << 32)), int(rng.integers(0, 1 << 32))
    mask = DropoutMask(float(rng.random()), key, i, j, tuple(slice(int(p), int(q)) for p, q in bounds), extra)
    return mask, (a, b, n, int((bounds[:, 1] - bounds[:, 0]).sum()))


@pytest.mark.parametrize("seed", range(60))
def test_dropout_is_the_specifications_bit_for_bit(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On any number of threads; the rows' indices broadcast; sizes may be zero."""
    mask, shape = drawn(np.random.default_rng(seed))
    monkeypatch.setattr(threads, "_WORTH", 1)
    for dtype in (np.float32, np.float64):
        x = np.random.default_rng(seed).normal(size=shape).astype(dtype)
        expected = reference.dropout(x, mask)
        for count in (1, 3):
            monkeypatch.setattr(threads, "count", lambda count=count: count)
            found = COMPILED.dropout(x, mask)
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_attention_drops_what_the_mask_says(seed: int, causal: bool) -> None:
    """Scores of zero and values that are the unit matrix: the output is the mask, over the number of keys seen."""
    rng = np.random.default_rng(seed)
    t = int(rng.integers(2, 150))
    s, cut = t if causal else int(rng.integers(1, 150)), int(rng.integers(1, t))
    runs = slice(7, 7 + cut), slice(99 + cut, 99 + t)
    mask = DropoutMask(0.4, (1, seed), rng.permutation(s), np.array([4, 9])[:, None, None], runs, np.arange(6)[:, None])
    q, kv = np.zeros((s, 2, 6, t)), np.zeros((t, 2, 3, 2, t))
    kv[..., 1, :] = np.eye(t)[:, None, None]
    o, lse = COMPILED.attention(q, kv, 1.0, mask, causal)
    seen = np.tri(s, t, dtype=bool) if causal else np.ones((s, t), bool)
    expected = mask.keep() * seen / (0.6 * seen.sum(-1, keepdims=True))
    np.testing.assert_allclose(o.transpose(1, 2, 0, 3), expected, rtol=1e-13, atol=0)
    dkv = COMPILED.attention_backward(np.ones_like(o), q, kv, o, lse, 1.0, mask, causal)[1]
    per_key = expected.sum(2).reshape(2, 3, 2, t).sum(2)
    np.testing.assert_allclose(dkv[..., 1, 0].transpose(1, 2, 0), per_key, rtol=1e-12, atol=1e-14)
