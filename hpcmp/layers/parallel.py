"""How layers lie over the ranks of one model replica: the one object that every layer of a model is built with."""

from __future__ import annotations

from ..collectives import AllGather, AllReduce, Collective, Copy, ReduceScatter
from ..comm.base import Communicator, Solo
from ..cursor import Cursor
from ..module import Index, Initial, Parameter


class ModelParallel:
    """The group ``tp``, the cursor, and whether activations between layers are sharded over the sequence.

    enter leads from the activations between layers into a column-parallel layer, leave from a row-parallel layer back:

        sequence parallel:  enter = AllGather over the sequence,  leave = ReduceScatter
        otherwise:          enter = Copy,                         leave = AllReduce

    Shoeybi et al., "Megatron-LM", 2019, section 3; Korthikanti et al., 2022, section 4.2.2. ``ModelParallel()`` is the
    serial case, in which every collective is the identity.
    """

    def __init__(self, tp: Communicator | None = None, cursor: Cursor | None = None, *, sequence: bool = False) -> None:
        self.tp = tp or Solo()
        self.cursor = cursor or Cursor()
        self.sequence = sequence
        self.enter: Collective = AllGather(self.tp, 0, self.cursor.length) if sequence else Copy(self.tp)
        self.leave: Collective = ReduceScatter(self.tp, 0, self.cursor.length) if sequence else AllReduce(self.tp)

    def positions(self) -> slice:
        """The sequence positions that this rank holds between layers."""
        length = self.cursor.length()
        return self.tp.part(length) if self.sequence else slice(0, length)

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
        name: str = "",
    ) -> Parameter:
        """A parameter of one axis of which this rank holds ``part`` (an even share, by default) and owns ``owned``.

        overlaps: whether the parts of the group overlap anywhere (the same answer on every rank).
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
            name=name,
        )
