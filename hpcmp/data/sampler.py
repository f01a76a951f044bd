"""Which tokens are sample n: a pure function of seed and n, so the order cannot depend on the layout.

An epoch cuts the tokens into W windows of ``sequence`` inputs (and one token more, the last target), from an offset
that changes every epoch, and visits them in the order of a keyed permutation p of [0, W):

    sample n:  epoch e = n // W,  tokens from  offset_e + p_e(n mod W) * sequence

Nothing is stored and nothing is shuffled in memory: any sample of any epoch costs the same few operations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, InputError
from ..random import key
from .tokens import Split

ROUNDS = 8


@dataclass
class Sampler:
    """The order of samples over ``tokens`` tokens, each sample ``sequence`` + 1 consecutive ones.

    An epoch has W = tokens // sequence - 1 windows, at least 1. That leaves fewer than 2 * sequence tokens out, before
    the first window and after the last, others each epoch, and no token is left out always. ``digest`` identifies the
    data and ``name`` names it in errors. The only state is ``samples``, the number of samples consumed.

    Raises DataError if there are fewer than ``sequence`` + 1 tokens.
    """

    tokens: int
    sequence: int
    seed: int
    digest: str = ""
    name: str = "the data"
    samples: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.sequence < 1:
            raise InputError(f"the sequence length must be at least 1, not {self.sequence}")
        if self.tokens < self.sequence + 1:
            raise DataError(
                f"{self.name} has {self.tokens} tokens, but one sample of sequence length {self.sequence} needs "
                f"{self.sequence + 1}: give more text or a shorter sequence"
            )

    @classmethod
    def over(cls, split: Split, sequence: int, seed: int) -> Sampler:
        """The sampler of a token file's split."""
        return cls(len(split), sequence, seed, split.digest, split.name)

    @property
    def windows(self) -> int:
        """Samples in an epoch."""
        return max(1, self.tokens // self.sequence - 1)

    def offset(self, epoch: int) -> int:
        """Where the first window of an epoch starts: in [0, tokens - W * sequence), so that all windows fit."""
        return _key(self.seed, "offset", epoch) % (self.tokens - self.windows * self.sequence)

    def start(self, n: int) -> int:
        """The first token of sample ``n`` (0, 1, 2, ... over the whole run)."""
        return int(self.starts(np.asarray([n]))[0])

    def starts(self, n: NDArray[Any]) -> NDArray[np.int64]:
        """``start`` of many samples at once: integers of any shape, to int64 of that shape."""
        epoch, place = np.divmod(np.asarray(n, np.int64), self.windows)
        starts = np.empty_like(place)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            window = permute(place[here], self.windows, _key(self.seed, "order", e))
            starts[here] = self.offset(e) + window * self.sequence
        return starts

    def batch(self, step: int, batch: int) -> NDArray[np.int64]:
        """``start`` of every rank's samples of a step, where each step consumes ``batch``: int64, shape (batch,)."""
        return self.starts(np.arange(step * batch, (step + 1) * batch))

    def held_out(self, count: int) -> NDArray[np.int64]:
        """The starts of ``count`` windows spread evenly over the tokens, the same at every call: for evaluation.

        The windows do not overlap; where there are fewer than ``count``, all of them. int64, ascending.
        """
        windows = (self.tokens - 1) // self.sequence
        count = min(count, windows)
        return np.arange(count, dtype=np.int64) * windows // count * self.sequence

    def state_dict(self) -> dict[str, int | str]:
        """How far the run is, and what that number means only together with: plain values for JSON."""
        return {"samples": self.samples, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises InputError, and changes nothing, if it was taken over other data or with another sequence length or seed:
        the samples would be others, and some would be seen twice and some never.
        """
        for name, now in self._identity().items():
            then = state.get(name)
            if then != now:
                raise InputError(
                    f"cannot resume the order of samples in {self.name}: {name} was {then}, now it is {now}; restore "
                    "it, or start a new run from these weights"
                )
        samples = state.get("samples")
        if not isinstance(samples, int) or samples < 0:
            raise InputError(f"cannot resume the order of samples in {self.name}: samples is {samples!r}")
        self.samples = samples

    def _identity(self) -> dict[str, int | str]:
        return {"digest": self.digest, "tokens": self.tokens, "sequence": self.sequence, "seed": self.seed}


def permute(x: NDArray[np.int64], size: int, word: int) -> NDArray[np.int64]:
    """The permutation of [0, ``size``) keyed by a 64-bit word, element by element: a bijection for every ``size`` >= 1.

    A Feistel network on 2h bits, (l, r) -> (r, l xor f(r)), permutes [0, 4^h) whatever f is; with the least h for which
    4^h >= size, values outside [0, size) are sent through again until they fall inside ("cycle walking", Black and
    Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002), fewer than 4 times on average.
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    keys = _mix(np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(word))
    y = np.array(x, np.uint64)
    todo = np.ones(y.shape, bool)
    while todo.any():
        left, right = y[todo] >> shift, y[todo] & mask
        for k in keys:
            left, right = right, left ^ (_mix(right ^ k) & mask)
        y[todo] = left << shift | right
        todo = y >= np.uint64(size)
    return y.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(seed: int, *names: object) -> int:
    low, high = key(seed, *names)
    return high << 32 | low
