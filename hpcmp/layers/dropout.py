"""Dropout whose mask depends on the seed, the step, the sample and the position, never on the layout."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from ..arrays import Array, array_module
from ..cursor import Cursor, Place
from ..module import Module
from ..random import DropoutMask
from ..wgrad import WGrad
from .parallel import ModelParallel


class Dropout(Module):
    """y = x keep / (1 - rate), keep drawn by global index. Srivastava et al., 2014.

    x (s, batch, h), perhaps a shard of the sequence; of the ``hidden`` columns it has this rank's share over tp_y. The
    element at position t of sample i, column c keeps its value if word(key(seed, name, step), t, i, c) says so (see
    ``hpcmp.random``). A rate of 0, and evaluation, keep everything. Backward draws the mask again: compiled, drawing
    and applying it takes a third longer than reading one of a byte an element, which would stay in memory until then.
    """

    def __init__(self, parallel: ModelParallel, hidden: int, rate: float, name: str) -> None:
        self.parallel, self.rate, self.name = parallel, rate, name
        self.columns = parallel.tp_y.part(hidden)
        if rate:
            parallel.cursor.draw(name)

    def forward(self, x: Array) -> tuple[Array, DropoutMask | None]:
        return self.forward_onto(x, None)

    def forward_onto(self, x: Array, onto: Array | None) -> tuple[Array, DropoutMask | None]:
        place = self.parallel.cursor.place
        if self.rate == 0 or not place.training:
            return x if onto is None else kernels.of(x).add(onto, x), None
        xp, cursor = array_module(x), self.parallel.cursor
        mask = DropoutMask(
            self.rate,
            cursor.key(self.name, place, xp),
            _there(self.parallel.positions()[:, None], xp),
            samples(cursor, place, x.shape[1], xp),
            (self.columns,),
        )
        return kernels.of(x).dropout(x, mask, onto), mask

    def backward(self, dy: Array, saved: DropoutMask | None, wgrad: WGrad) -> Array:
        return dy if saved is None else kernels.of(dy).dropout(dy, saved)


def attention_mask(
    rate: float,
    name: str,
    cursor: Cursor,
    place: Place,
    queries: NDArray[np.int64],
    keys: NDArray[np.int64],
    heads: slice,
    like: Array,
) -> DropoutMask | None:
    """What attention keeps of its probabilities, by sample, head, query and key; None where nothing is dropped.

    queries, keys: their positions in the whole sequence, those of the keys in a few contiguous runs; heads: of all.
    like (s, batch, ...) gives the batch and kind of the mask, (batch, heads, queries, keys).
    """
    if rate == 0 or not place.training or not queries.size or not keys.size:
        return None
    xp = array_module(like)
    return DropoutMask(
        rate,
        cursor.key(name, place, xp),
        _there(queries, xp),
        samples(cursor, place, like.shape[1], xp)[:, None, None],
        tuple(slice(int(r[0]), int(r[-1]) + 1) for r in np.split(keys, np.flatnonzero(np.diff(keys) != 1) + 1)),
        _there(np.arange(heads.start, heads.stop)[:, None], xp),
    )


def samples(cursor: Cursor, place: Place, batch: int, xp: Any) -> Array:
    """Each sample's index within the global batch."""
    return xp.arange(batch) if place.samples is None else cursor.arrays(place, xp)["drawn"][:batch]


def _there(indices: NDArray[np.int64], xp: ModuleType) -> Array:
    """The same numbers as an array of ``xp``: one for all who ask for them, which stays, since CUDA graphs read it."""
    return _copied(np.asarray(indices, np.int64).tobytes(), indices.shape, xp)


@functools.cache
def _copied(numbers: bytes, shape: tuple[int, ...], xp: ModuleType) -> Array:
    return xp.asarray(np.frombuffer(numbers, np.int64).reshape(shape))
