"""How layers lie over the ranks of one model replica: the one object that every layer of a model is built with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .. import partition
from ..collectives import AllGather, AllReduce, Collective, Copy, ReduceScatter
from ..comm.base import Communicator, Solo
from ..cursor import Cursor
from ..module import Index, Initial, Parameter


class ModelParallel:
    """The groups of a replica, the cursor, and whether activations between layers are sharded over the sequence.

    tp shares each layer's heads and columns, tp_y the inner axis of its weights (3-D tensor parallelism), ring and
    ulysses the positions of a sequence (context parallelism), ep the experts. ``ModelParallel()`` is the serial case,
    in which every collective is the identity.

    enter leads from the activations between layers into a column-parallel layer, leave from a row-parallel layer back:

        sequence parallel:  enter = AllGather over the sequence,  leave = ReduceScatter
        otherwise:          enter = Copy,                         leave = AllReduce

    Shoeybi et al., "Megatron-LM", 2019, section 3; Korthikanti et al., 2022, section 4.2.2. With context parallelism
    the sequence is this rank's ``context``: every layer but attention works on that as if it were the whole.
    """

    def __init__(
        self,
        tp: Communicator | None = None,
        cursor: Cursor | None = None,
        *,
        sequence: bool = False,
        tp_y: Communicator | None = None,
        ring: Communicator | None = None,
        ulysses: Communicator | None = None,
        ep: Communicator | None = None,
    ) -> None:
        self.tp, self.tp_y, self.ep = tp or Solo(), tp_y or Solo(), ep or Solo()
        self.ring, self.ulysses = ring or Solo(), ulysses or Solo()
        self.cursor = cursor or Cursor()
        self.sequence = sequence
        self.enter: Collective = AllGather(self.tp, 0, self.length) if sequence else Copy(self.tp)
        self.leave: Collective = ReduceScatter(self.tp, 0, self.length) if sequence else AllReduce(self.tp)

    def ring_context(self) -> NDArray[np.int64]:
        """The positions of the whole sequence that this rank's place on the ring holds, over its ulysses group."""
        return partition.zigzag(self.cursor.place.length, self.ring.size, self.ring.rank)

    def context(self) -> NDArray[np.int64]:
        """The positions of the whole sequence that this rank holds within a layer, in the order of its rows."""
        held = self.ring_context()
        mine: NDArray[np.int64] = held[self.ulysses.part(len(held))]
        return mine

    def length(self) -> int:
        """How many positions this rank holds within a layer (a method: a collective asks for it when it runs)."""
        return len(self.context())

    def positions(self) -> NDArray[np.int64]:
        """The positions of the whole sequence that this rank holds between layers, in the order of its rows."""
        held = self.context()
        return held[self.tp.part(len(held))] if self.sequence else held

    def replicated(self, *shape: int, initial: Initial | None = None, decay: bool = True) -> Parameter:
        """A parameter that every rank holds whole and uses on the activations between layers.

        With those sharded over the sequence each rank sees only a part of its gradient, which then owes a sum over tp.
        The first rank owns it.
        """
        owned = None if self.tp.rank == 0 else tuple(slice(0, 0) for _ in shape)
        shared = ("tp",) if self.sequence else ()
        return Parameter(shape, owned=owned, initial=initial, decay=decay, shared=shared)

    def sharded(
        self,
        *shape: int,
        axis: int,
        part: slice | None = None,
        owned: slice | None = None,
        overlaps: bool = False,
        initial: Initial | None = None,
        decay: bool = True,
        matrix: tuple[int, int] | None = None,
        name: str = "",
    ) -> Parameter:
        """A parameter of one axis of which this rank holds ``part`` (an even share, by default) and owns ``owned``.

        overlaps: whether the parts of the group overlap anywhere (the same on every rank). matrix: see Parameter.
        """
        part = part or self.tp.part(shape[axis])

        def slab(s: slice) -> Index:
            return tuple(s if i == axis else slice(0, n) for i, n in enumerate(shape))

        return Parameter(
            shape,
            slab(part),
            owned=slab(owned or part),
            initial=initial,
            decay=decay,
            shared=("tp",) if overlaps else (),
            overlaps=overlaps,
            matrix=matrix,
            name=name,
        )
