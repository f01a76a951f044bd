"""Which samples and positions of the whole run the arrays at hand stand for."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import random
from .arrays import Array
from .documents import Documents


@dataclass(frozen=True)
class Place:
    """One microbatch's place in the run.

    step: the optimizer step; samples: the index of each sample within the global batch, shape (batch,);
    length: the whole sequence's length, however it is sharded; training: whether dropout applies; weight: what the
    loss of one token weighs in the gradient (1 / tokens of the global batch, times the loss scale), for layers that
    have a loss of their own; documents: where each sample's documents are, None if they are not kept apart.
    arrays: of what layers read where they compute, made once by ``Cursor.arrays``.
    """

    step: int = 0
    samples: NDArray[np.int64] | None = None
    length: int = 0
    training: bool = True
    weight: float = 1.0
    documents: Documents | None = None
    arrays: dict[str, Array] = field(default_factory=dict, init=False, compare=False, repr=False)


class Cursor:
    """The place of the microbatch that is being computed; the pipeline's runner moves it before every action.

    Layers that need more than their input's numbers share the model's one cursor: dropout draws by sample and
    position, sequence-parallel collectives need the whole sequence's length. Everything else never sees it.

    ``losses`` gathers, by name, the sums over tokens of the losses that layers have of their own (a router's): each is
    added in the backward, once for each microbatch, on one of the ranks that hold the same value: numbers, or arrays
    without axes, where the layers compute.

    ``draws`` has the layers that draw random numbers, by name: each one's number.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.place = Place()
        self.losses: dict[str, Any] = {}
        self.draws: dict[str, int] = {}

    def arrays(self, place: Place, xp: ModuleType) -> dict[str, Array]:
        """What differs between microbatches of one shape, as arrays of ``xp``: all that layers of captured blocks read
        of ``place``. Each gets to a GPU by one copy, for which the host does not wait.

        drawn (int64), if it is for training and layers draw: the index of each sample, then for each layer of ``draws``
        the two words of ``random.key(seed, its name, step)``.
        """
        if place.training and self.draws:
            samples = () if place.samples is None else place.samples
            drawn = place.arrays.get("drawn")
            if drawn is None or len(drawn) != len(samples) + 2 * len(self.draws):
                keys = [word for name in self.draws for word in random.key(self.seed, name, place.step)]
                place.arrays["drawn"] = xp.asarray(np.array([*samples, *keys], np.int64))
        return place.arrays

    def draw(self, name: str) -> int:
        """The number of the layer ``name``, which draws from now on."""
        return self.draws.setdefault(name, len(self.draws))

    def key(self, name: str, place: Place, xp: ModuleType) -> Array:
        """The two words of the key by which the layer ``name`` draws."""
        first, drawn = 2 * self.draw(name), self.arrays(place, xp)["drawn"]
        first += len(drawn) - 2 * len(self.draws)
        return drawn[first : first + 2]
