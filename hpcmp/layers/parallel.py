"""How layers lie over the ranks of one model replica: the one object that every layer of a model is built with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import partition
from ..collectives import AllGather, AllReduce, Collective, Copy, ReduceScatter
from ..comm.base import Communicator, Solo
from ..cursor import Cursor
from ..module import Index, Initial, Parameter
from .products import Products


class ModelParallel:
    """The groups of a replica, the cursor, what linears multiply with (``products``), and whether activations between
    layers are sharded over the sequence.

    tp shares each layer's heads and columns, tp_y the inner axis of its weights (3-D tensor parallelism), ring and
    ulysses the positions of a sequence (context parallelism; cp is both together), ep the experts. ``ModelParallel()``
    is the serial case, in which every collective is the identity.

    enter leads from the activations between layers into a column-parallel layer, leave from a row-parallel layer back:

        sequence parallel:  enter = AllGather over the sequence,  leave = ReduceScatter
        otherwise:          enter = Copy,                         leave = AllReduce

    tp_y shares hidden: between layers a rank holds its share of the columns (uneven, or none), within a layer all ranks
    of tp_y hold the same numbers. A column-parallel layer ends with contract, the sum over the parts of hidden; a
    row-parallel layer begins with expand, after which each rank makes its own columns of hidden:

        contract = AllReduce over tp_y,  expand = Copy over tp_y,  each the other's adjoint

    With context parallelism the sequence is this rank's ``context``: every layer but attention works on that as if it
    were the whole.

    Shoeybi et al., "Megatron-LM", 2019, section 3; Korthikanti et al., 2022, section 4.2.2; for tp_y Singh et al., "A
    4D hybrid algorithm to scale parallel training to thousands of GPUs", 2023.
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
        cp: Communicator | None = None,
        ep: Communicator | None = None,
        products: Products | None = None,
    ) -> None:
        self.tp, self.tp_y, self.ep = tp or Solo(), tp_y or Solo(), ep or Solo()
        self.ring, self.ulysses, self.cp = ring or Solo(), ulysses or Solo(), cp or Solo()
        self.cursor = cursor or Cursor()
        self.products = products or Products()
        self.sequence = sequence
        self._context: tuple[int, NDArray[np.int64]] | None = None  # the last one, and its sequence's length
        self.enter: Collective = AllGather(self.tp, 0, self.length) if sequence else Copy(self.tp)
        self.leave: Collective = ReduceScatter(self.tp, 0, self.length) if sequence else AllReduce(self.tp)
        self.contract: Collective = AllReduce(self.tp_y)
        self.expand: Collective = Copy(self.tp_y)

    def ring_context(self) -> NDArray[np.int64]:
        """The positions of the whole sequence that this rank's place on the ring holds, over its ulysses group."""
        return partition.zigzag(self.cursor.place.length, self.ring.size, self.ring.rank)

    def context(self) -> NDArray[np.int64]:
        """The positions of the whole sequence that this rank holds within a layer, in the order of its rows."""
        length = self.cursor.place.length
        if self._context is None or self._context[0] != length:  # it is asked for at every collective
            held = self.ring_context()
            self._context = length, held[self.ulysses.part(len(held))]
        return self._context[1]

    def length(self) -> int:
        """How many positions this rank holds within a layer (a method: a collective asks for it when it runs)."""
        return len(self.context())

    def positions(self) -> NDArray[np.int64]:
        """The positions of the whole sequence that this rank holds between layers, in the order of its rows."""
        held = self.context()
        return held[self.tp.part(len(held))] if self.sequence else held

    def replicated(
        self, *shape: int, hidden: int | None = None, initial: Initial | None = None, decay: bool = True
    ) -> Parameter:
        """A parameter that every rank of tp holds alike and uses on the activations between layers.

        With those sharded over the sequence each rank sees only a part of its gradient, which then owes a sum over tp.
        The first rank owns it. hidden: see ``sharded``.
        """
        index = self._index(shape, hidden)
        return Parameter(
            shape,
            index,
            owned=self._owned(index, hidden) if self.tp.rank == 0 else _none(index),
            initial=initial,
            decay=decay,
            shared=("tp",) if self.sequence else (),
        )

    def sharded(
        self,
        *shape: int,
        axis: int,
        hidden: int | None = None,
        part: slice | None = None,
        owned: slice | None = None,
        overlaps: bool = False,
        initial: Initial | None = None,
        decay: bool = True,
        matrix: tuple[int, int] | None = None,
        name: str = "",
    ) -> Parameter:
        """A parameter of one axis of which this rank holds ``part`` (an even share, by default) and owns ``owned``.

        hidden: the axis, if any, that is the model's hidden one: of it the rank holds its share over tp_y. Without one
        the ranks of tp_y hold the same, and the first owns it; their gradients are whole, since what a layer computes
        is the same on all of them. overlaps: whether the parts of the group overlap anywhere (the same on every rank).
        matrix: see Parameter.
        """
        part = part or self.tp.part(shape[axis])
        return Parameter(
            shape,
            self._index(shape, hidden, axis, part),
            owned=self._owned(self._index(shape, hidden, axis, owned or part), hidden),
            initial=initial,
            decay=decay,
            shared=("tp",) if overlaps else (),
            overlaps=overlaps,
            matrix=matrix,
            name=name,
        )

    def _index(self, shape: tuple[int, ...], hidden: int | None, axis: int | None = None, part: Any = None) -> Index:
        """The slab that is ``part`` of ``axis``, this rank's share over tp_y of ``hidden``, and all of the others."""
        cuts = {axis: part} | ({} if hidden is None else {hidden: self.tp_y.part(shape[hidden])})
        return tuple(cuts.get(i) or slice(0, n) for i, n in enumerate(shape))

    def _owned(self, index: Index, hidden: int | None) -> Index:
        """``index``, or none of it on all but the first of the ranks of tp_y where these hold the same."""
        return index if hidden is not None or self.tp_y.rank == 0 else _none(index)


def _none(index: Index) -> Index:
    return tuple(slice(s.start, s.start) for s in index)
