"""Documents within a sample: where each begins, and which keys a query sees where no document sees another."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import Array


@dataclass(frozen=True, eq=False)
class First:
    """The first key that each query sees, as a row of the block of keys at hand: (batch, s) int32, contiguous.

    It does not fall from a query to the next, and is as large as there are keys, or larger, where a query sees none.
    ``rows`` lies where the arrays of the attention lie; ``host`` is the same on the host, for what is planned there.
    """

    rows: Array
    host: NDArray[np.int32]

    @classmethod
    def of(cls, host: NDArray[Any], xp: Any) -> First:
        """From an array on the host, for arrays of the module ``xp``."""
        host = np.ascontiguousarray(host, np.int32)
        return cls(host if xp is np else xp.asarray(host), host)

    @functools.cached_property
    def everything(self) -> bool:
        """Whether every query sees the first key, and so none is left out. Asked by every layer."""
        return not self.host.any()

    def any(self, keys: int) -> bool:
        """Whether any query sees any of a block of so many keys."""
        return bool((self.host[:, :1] < keys).any())  # of a sample its first query sees the earliest


@dataclass(frozen=True, eq=False)
class Documents:
    """What layers need to compute each document of a microbatch as if it were alone; one for all layers of a rank.

    blocks: the first keys of this rank's queries in the keys of each rank of the ring, as ``layers.context.Ring.pair``
    cuts both. positions: (s, batch) int32, where the layers compute: how far behind the beginning of its document each
    position is that the rank holds between layers. ``layers.context.documents`` makes it.
    """

    blocks: tuple[First, ...]
    positions: Array


def beginnings(tokens: NDArray[Any], end: int) -> NDArray[np.int32]:
    """Where the document of each position begins: tokens (S, batch) -> (batch, S).

    ``end`` closes a document and is the last token of it. A sample begins one, wherever the text was cut.
    """
    begins = np.zeros(tokens.shape, np.int32)
    begins[1:] = np.where(tokens[:-1] == end, np.arange(1, len(tokens), dtype=np.int32)[:, None], 0)
    return np.ascontiguousarray(np.maximum.accumulate(begins, 0).T)
