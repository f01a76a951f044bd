"""Random numbers by global index: the same numbers on every layout.

A number is a pure function of *where* it stands, never of what was drawn before it:

    word(key, i, j, c, e) = Philox4x32-10(counter = (i, j, c // 4, e), key)[c mod 4]

``i``, ``j`` name a row (32 bits each), ``c`` the column within it and ``e`` a further index (an attention head). A
rank that holds a slab of an array evaluates the function on its slab alone and gets what the serial run has there.
Philox4x32-10 is from Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from .arrays import Array

MULTIPLIER = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_CHUNK = 1 << 14  # counters worked on at once: small enough for the second-level cache


def _chunk(xp: ModuleType) -> int:
    """How many counters to work on at once: on a GPU, whose memory is its cache, many."""
    return _CHUNK if xp is np else _CHUNK << 8


def key(seed: int, *names: object) -> tuple[int, int]:
    """A 64-bit key, as two 32-bit words, from a seed and any names (a parameter's name; a layer's name and a step)."""
    text = "/".join(str(name) for name in (seed, *names))
    word = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return word & _LOW, word >> 32


def round_keys(key: tuple[Any, Any] | Array) -> list[tuple[Any, Any]]:
    """The two key words of each of Philox's ten rounds."""
    return [((key[0] + r * _WEYL[0]) & _LOW, (key[1] + r * _WEYL[1]) & _LOW) for r in range(10)]


def philox(
    counter: tuple[Array, Array, Array, Array], key: tuple[int, int] | Array
) -> tuple[Array, Array, Array, Array]:
    """Philox4x32-10: four words from four counter words and two key words; all hold 32-bit values in ``uint64``."""
    c0, c1, c2, c3 = counter
    shift, low = np.uint64(32), np.uint64(_LOW)
    m0, m1 = (np.uint64(m) for m in MULTIPLIER)
    for k0, k1 in round_keys(key):
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & low, (p0 >> shift) ^ c3 ^ k1, p0 & low
    return c0, c1, c2, c3


def bits(
    key: tuple[int, int] | Array, i: Array, j: Array, columns: slice, extra: Array | int = 0, xp: ModuleType = np
) -> Array:
    """The 32-bit words of some rows and a range of columns.

    ``i``, ``j`` and ``extra`` are integer arrays that broadcast to the shape of the rows; the result is a ``uint32``
    array of that shape with a last axis of ``columns.stop - columns.start`` words. ``key`` is two words, or an array of
    them.
    """
    key = key if isinstance(key, tuple) else key.astype(np.uint64)
    i, j, e = xp.broadcast_arrays(*(xp.asarray(v, dtype=np.uint64) for v in (i, j, extra)))
    width = columns.stop - columns.start
    first, last = columns.start // 4, -(-columns.stop // 4)
    block = xp.arange(first, last, dtype=np.uint64)
    rows = [v.reshape(-1, 1) for v in (i, j, e)]
    out = xp.empty((rows[0].shape[0], width), np.uint32)
    step = max(1, _chunk(xp) // max(1, last - first))
    for a in range(0, out.shape[0], step):
        ci, cj, ce = (v[a : a + step] for v in rows)
        n = ci.shape[0]
        words = xp.empty((n, last - first, 4), np.uint32)
        for lane, word in enumerate(philox((ci, cj, block, ce), key)):
            words[..., lane] = word
        out[a : a + n] = words.reshape(n, -1)[:, columns.start - 4 * first : columns.stop - 4 * first]
    return out.reshape(*i.shape, width)


def normal(key: tuple[int, int], i: Array, j: Array, columns: slice, xp: ModuleType = np) -> Array:
    """Standard normal numbers in float64, by Box and Muller: columns 2m and 2m + 1 share words 2m and 2m + 1.

    n_{2m} = r cos t,  n_{2m+1} = r sin t,  r = sqrt(-2 ln u_{2m}),  t = 2 pi u_{2m+1},  u = (word + 1/2) / 2^32
    """
    pairs = slice(columns.start - columns.start % 2, columns.stop + columns.stop % 2)
    i, j = xp.broadcast_arrays(xp.asarray(i), xp.asarray(j))
    shape, rows = i.shape, (i.reshape(-1), j.reshape(-1))
    width = pairs.stop - pairs.start
    out = xp.empty((rows[0].size, width // 2, 2))
    step = max(1, _chunk(xp) // max(1, width))
    for a in range(0, len(out), step):
        part = out[a : a + step]
        words = bits(key, rows[0][a : a + step], rows[1][a : a + step], pairs, xp=xp).reshape(part.shape)
        uniform = (words + 0.5) * 2.0**-32
        radius, angle = xp.sqrt(-2 * xp.log(uniform[..., 0])), 2 * np.pi * uniform[..., 1]
        part[..., 0], part[..., 1] = radius * xp.cos(angle), radius * xp.sin(angle)
    skip = columns.start - pairs.start
    return out.reshape(*shape, width)[..., skip : skip + columns.stop - columns.start]


def normal_slab(key: tuple[int, int], shape: tuple[int, ...], index: tuple[slice, ...], xp: ModuleType = np) -> Array:
    """The part ``index`` of an array of standard normal numbers of global ``shape``; rows are its leading axes."""
    row = xp.zeros((), np.uint64)
    for n, s in zip(shape[:-1], index[:-1], strict=True):
        row = row[..., None] * np.uint64(n) + xp.arange(s.start, s.stop, dtype=np.uint64)
    return normal(key, row & np.uint64(_LOW), row >> np.uint64(32), index[-1], xp)


@dataclass(frozen=True, eq=False)
class DropoutMask:
    """Which elements of an array dropout keeps, said by global index, and drawn where they are needed:

        keep[..., c] = word(key, i[...], j[...], c, extra[...]) >= rate 2^32,

    true with probability 1 - rate (to within 2^-32). ``i``, ``j`` and ``extra`` broadcast to the shape of the rows, as
    for ``bits``; the columns are those of ``runs``, one run after the other. Kernels take it in place of an array: the
    compiled ones draw a row while they work on it, so that no mask is ever in memory. ``key``, two words,
    ``i``, ``j`` and ``extra`` may be arrays where the mask is drawn: what they hold then counts.
    """

    rate: float
    key: tuple[int, int] | Array
    i: Array
    j: Array
    runs: tuple[slice, ...]
    extra: Array | int = 0

    @property
    def threshold(self) -> np.uint32:
        """The least word whose element is kept."""
        return np.uint32(min(round(self.rate * 2**32), _LOW))

    def keep(self, xp: ModuleType = np) -> Array:
        """The mask as booleans: the rows' shape, and a last axis for the columns."""
        parts = [bits(self.key, self.i, self.j, run, self.extra, xp) >= self.threshold for run in self.runs]
        return parts[0] if len(parts) == 1 else xp.concatenate(parts, -1)

    def scaled(self, dtype: Any, xp: ModuleType = np) -> Array:
        """keep / (1 - rate), what dropout multiplies by."""
        return self.keep(xp) * np.dtype(dtype).type(1 / (1 - self.rate))
