"""Which samples and positions of the whole run the arrays at hand stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Place:
    """One microbatch's place in the run.

    step: the optimizer step; samples: the index of each sample within the global batch, shape (batch,);
    length: the whole sequence's length, however it is sharded; training: whether dropout applies; weight: what the
    loss of one token weighs in the gradient (1 / tokens of the global batch, times the loss scale), for layers that
    have a loss of their own.
    """

    step: int = 0
    samples: NDArray[np.int64] | None = None
    length: int = 0
    training: bool = True
    weight: float = 1.0


class Cursor:
    """The place of the microbatch that is being computed; the pipeline's runner moves it before every action.

    Layers that need more than their input's numbers share the model's one cursor: dropout draws by sample and
    position, sequence-parallel collectives need the whole sequence's length. Everything else never sees it.

    ``losses`` gathers, by name, the sums over tokens of the losses that layers have of their own (a router's): each is
    added in the backward, once for each microbatch, on one of the ranks that hold the same value: numbers, or arrays
    without axes, where the layers compute.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.place = Place()
        self.losses: dict[str, Any] = {}
