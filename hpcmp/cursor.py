"""Which samples and positions of the whole run the arrays at hand stand for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Place:
    """One microbatch's place in the run.

    step: the optimizer step; samples: the index of each sample within the global batch, shape (batch,);
    length: the whole sequence's length, however it is sharded; training: whether dropout applies.
    """

    step: int = 0
    samples: NDArray[np.int64] | None = None
    length: int = 0
    training: bool = True


class Cursor:
    """The place of the microbatch that is being computed; the pipeline's runner moves it before every action.

    Layers that need more than their input's numbers share the model's one cursor: dropout draws by sample and
    position, sequence-parallel collectives need the whole sequence's length. Everything else never sees it.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.place = Place()

    def length(self) -> int:
        """The whole sequence's length (a method, so that a collective can ask for it when it runs)."""
        return self.place.length
