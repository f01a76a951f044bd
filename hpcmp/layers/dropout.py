"""Dropout whose mask depends on the seed, the step, the sample and the position, never on the layout."""

from __future__ import annotations

from typing import Any

from .. import random
from ..arrays import Array, array_module
from ..cursor import Cursor, Place
from ..module import Module
from ..wgrad import WGrad
from .parallel import ModelParallel


class Dropout(Module):
    """y = x keep / (1 - rate), keep drawn by global index. Srivastava et al., 2014.

    x (s, batch, h), perhaps a shard of the sequence. The element at position t of sample i, column c keeps its value if
    word(key(seed, name, step), t, i, c) says so (see ``hpcmp.random``). A rate of 0, and evaluation, keep everything.
    """

    def __init__(self, parallel: ModelParallel, rate: float, name: str) -> None:
        self.parallel, self.rate, self.name = parallel, rate, name

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
            slice(0, x.shape[2]),
            xp=xp,
        )
        return x * keep * self._scale(x), keep

    def backward(self, dy: Array, saved: Array | None, wgrad: WGrad) -> Array:
        return dy if saved is None else dy * saved * self._scale(dy)

    def _scale(self, x: Array) -> Any:
        return x.dtype.type(1 / (1 - self.rate))


def attention_mask(
    rate: float, name: str, cursor: Cursor, place: Place, shape: tuple[int, ...], heads: slice, like: Array
) -> Array | None:
    """keep / (1 - rate) for attention probabilities, (batch, heads here, s, s), by sample, head, query and key."""
    if rate == 0 or not place.training:
        return None
    xp = array_module(like)
    s, batch = shape
    keep = random.keep_mask(
        rate,
        random.key(cursor.seed, name, place.step),
        xp.arange(s),
        samples(place, batch, xp)[:, None, None],
        slice(0, s),
        xp.arange(heads.start, heads.stop)[:, None],
        xp=xp,
    )
    return keep * like.dtype.type(1 / (1 - rate))


def samples(place: Place, batch: int, xp: Any) -> Array:
    """Each sample's index within the global batch."""
    return xp.arange(batch) if place.samples is None else xp.asarray(place.samples)
