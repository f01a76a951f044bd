"""Dropout whose mask depends on the seed, the step, the sample and the position, never on the layout."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import kernels, random
from ..arrays import Array, array_module, wide
from ..cursor import Cursor, Place
from ..module import Module
from ..wgrad import WGrad
from .parallel import ModelParallel


class Dropout(Module):
    """y = x keep / (1 - rate), keep drawn by global index. Srivastava et al., 2014.

    x (s, batch, h), perhaps a shard of the sequence; of the ``hidden`` columns it has this rank's share over tp_y. The
    element at position t of sample i, column c keeps its value if word(key(seed, name, step), t, i, c) says so (see
    ``hpcmp.random``). A rate of 0, and evaluation, keep everything.
    """

    def __init__(self, parallel: ModelParallel, hidden: int, rate: float, name: str) -> None:
        self.parallel, self.rate, self.name = parallel, rate, name
        self.columns = parallel.tp_y.part(hidden)

    def forward(self, x: Array) -> tuple[Array, Array | None]:
        place = self.parallel.cursor.place
        if self.rate == 0 or not place.training:
            return x, None
        xp, here = array_module(x), self.parallel.positions()
        keep = random.keep_mask(
            self.rate,
            random.key(self.parallel.cursor.seed, self.name, place.step),
            xp.asarray(here)[:, None],
            samples(place, x.shape[1], xp),
            self.columns,
            xp=xp,
        )
        return kernels.of(x).dropout(x, keep, self.rate), keep

    def backward(self, dy: Array, saved: Array | None, wgrad: WGrad) -> Array:
        return dy if saved is None else kernels.of(dy).dropout(dy, saved, self.rate)


def attention_mask(
    rate: float,
    name: str,
    cursor: Cursor,
    place: Place,
    queries: NDArray[np.int64],
    keys: NDArray[np.int64],
    heads: slice,
    like: Array,
) -> Array | None:
    """keep / (1 - rate) for attention probabilities, by sample, head, query and key; None where nothing is dropped.

    queries, keys: their positions in the whole sequence, those of the keys in a few contiguous runs; heads: of all.
    like (s, batch, ...) gives the batch, kind and (wide) dtype of the result, (batch, heads, queries, keys).
    """
    if rate == 0 or not place.training or not queries.size or not keys.size:
        return None
    xp = array_module(like)
    runs = [slice(int(r[0]), int(r[-1]) + 1) for r in np.split(keys, np.flatnonzero(np.diff(keys) != 1) + 1)]
    row = (
        xp.asarray(queries),
        samples(place, like.shape[1], xp)[:, None, None],
        xp.arange(heads.start, heads.stop)[:, None],
    )
    key = random.key(cursor.seed, name, place.step)
    parts = [random.keep_mask(rate, key, row[0], row[1], run, row[2], xp=xp) for run in runs]
    keep = parts[0] if len(parts) == 1 else xp.concatenate(parts, -1)
    return keep * wide(like.dtype).type(1 / (1 - rate))


def samples(place: Place, batch: int, xp: Any) -> Array:
    """Each sample's index within the global batch."""
    return xp.arange(batch) if place.samples is None else xp.asarray(place.samples)
