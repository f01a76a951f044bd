"""Masks drawn inside loops: Philox4x32-10 in 64-bit lanes, bit for bit ``hpcmp.random``'s.

Integers alone decide what is dropped, so that masks are the same with and without Numba. A counter costs twenty
products of 32 bits to 64, for which processors have vectors (AVX2 four of them, AVX-512 eight).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import random
from .jit import FAST, inline

Floats = NDArray[np.floating]

_M0, _M1 = (np.uint64(m) for m in random.MULTIPLIER)
_LOW, _SHIFT, _FOUR = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(4)
_COUNTERS = 256  # of a piece of a row: their words, 4 KB, stay in the first-level cache


def rows_of(mask: random.DropoutMask | None, dtype: np.dtype[Any]) -> tuple[Any, ...]:
    """What loops are told of a mask: i, j and extra of its rows (rows, 3), the runs (runs, 2), the ten round keys
    (10, 2), the threshold and 1 / (1 - rate). No rows: no mask."""
    rows, runs = np.empty((0, 3), np.uint32), np.empty((0, 2), np.int64)
    if mask is None:
        return rows, runs, np.empty((10, 2), np.uint32), np.uint32(0), dtype.type(1)
    rows = np.stack([v.reshape(-1) for v in np.broadcast_arrays(mask.i, mask.j, mask.extra)], -1).astype(np.uint32)
    runs = np.array([(run.start, run.stop) for run in mask.runs], np.int64)
    keys = np.array(random.round_keys(mask.key), np.uint32)
    return rows, runs, keys, mask.threshold, dtype.type(1 / (1 - mask.rate))


@inline(FAST)
def _round(counter: Any, k0: Any, k1: Any) -> Any:
    c0, c1, c2, c3 = counter
    p0, p1 = c0 * _M0, c2 * _M1
    return (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW


@inline(FAST)
def philox(words: NDArray[np.uint32], row: NDArray[np.uint32], first: int, keys: NDArray[np.uint32]) -> None:
    """The words of the counters (i, j, first + m, extra), four each, for as many as ``words`` has room for."""
    i, j, extra = np.uint64(row[0]), np.uint64(row[1]), np.uint64(row[2])
    for m in range(words.size // 4):
        counter = i, j, np.uint64(first + m), extra
        for r in range(10):
            counter = _round(counter, np.uint64(keys[r, 0]), np.uint64(keys[r, 1]))
        at = _FOUR * np.uint64(m)  # not negative, as LLVM needs to know
        words[at], words[at + np.uint64(1)], words[at + np.uint64(2)], words[at + np.uint64(3)] = counter


@inline(FAST)
def room() -> Any:
    """What ``draw`` works in, to be made once for many rows."""
    return np.empty(4 * _COUNTERS, np.uint32)


@inline(FAST)
def draw(scaled: Floats, drawn: Any, row: int, words: NDArray[np.uint32], skipped: int) -> None:
    """keep / (1 - rate) for a row's columns after the first ``skipped``, as many as ``scaled`` has. drawn: ``rows_of``;
    words: ``room``."""
    rows, runs, keys, threshold, factor = drawn
    zero, filled = scaled.dtype.type(0), 0
    for run in range(runs.shape[0]):
        column = runs[run, 0] + skipped
        skipped = max(0, column - runs[run, 1])
        stop = min(runs[run, 1], column + scaled.size - filled)
        while column < stop:
            first, skip = column >> 2, column & 3
            size = min(stop - column, words.size - skip)
            philox(words[: (skip + size + 3) & ~3], rows[row], first, keys)
            part, found = scaled[filled : filled + size], words[skip : skip + size]
            for c in range(part.size):
                part[c] = factor if found[c] >= threshold else zero
            column += size
            filled += size
