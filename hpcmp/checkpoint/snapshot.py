"""A snapshot: a rank's share of a checkpoint as it is at one moment, and how it is copied to the host."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import array_module
from .background import Task, check
from .directory import step_name
from .slab import BLOCK, Slab

_ALIGNED = 64  # bytes: where each array begins


@dataclass(frozen=True)
class Snapshot:
    """What a rank writes of a checkpoint.

    step: the optimizer step. slabs: this rank's that are not empty, in the order of their names. In the background they
    are copies, NumPy arrays in C order in the memory of ``Memory``, complete once ``Copying.finish`` returns, and left
    alone until the next save begins; else the arrays that were given. state: of the run, plain JSON, a copy. taken: the
    time of it, in UTC.
    """

    step: int
    slabs: tuple[Slab, ...]
    state: dict[str, Any]
    taken: datetime

    @property
    def name(self) -> str:
        """The name of the checkpoint, such as step_00001000."""
        return step_name(self.step)


class Memory:
    """The host's memory for a rank's snapshots, one at a time; as large as the largest so far.

    It is kept from one to the next, where new memory costs far more than the copy (the system clears every page).
    """

    def __init__(self) -> None:
        self._block: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._clearing: Task[None] | None = None

    def prepare(self, slabs: Sequence[Slab]) -> None:
        """Take the memory for such slabs before it is needed, and have a thread write to it once.

        So the first snapshot is as fast as the others. Raises MemoryError.
        """
        self.like(slabs)
        self._clearing = Task(partial(_clear, self._block))

    def like(self, slabs: Sequence[Slab]) -> list[Slab]:
        """The slabs with other arrays: in this memory, of the same shapes and dtypes, with anything in them.

        Pinned if some slabs lie on a GPU. Raises MemoryError.
        """
        if self._clearing is not None:
            self._clearing.give_up()
            self._clearing.finish()  # however long: what it clears would be lost
            self._clearing = None
        ends = [0]
        for slab in slabs:
            ends.append(-(-(ends[-1] + slab.data.nbytes) // _ALIGNED) * _ALIGNED)
        if self._block.size < ends[-1]:
            self._block = np.empty(0, np.uint8)  # the old memory first, then the new
            self._block = _empty(ends[-1], any(array_module(slab.data) is not np for slab in slabs))
        made = []
        for slab, at in zip(slabs, ends, strict=False):
            shape, dtype = slab.data.shape, np.dtype(slab.data.dtype)
            array = self._block[at : at + dtype.itemsize * math.prod(shape)].view(dtype).reshape(shape)
            made.append(Slab(slab.name, slab.shape, slab.index, array))
        return made


class Copying:
    """The making of a snapshot: arrays of a GPU are copied at once, those of the host by ``finish``, in a thread.

    Until ``settle`` returns, nothing may write to the arrays of ``slabs``. Between two updates of an optimizer nothing
    does: that a forward and a backward pass by is time enough, as a rule.
    """

    def __init__(self, slabs: Sequence[Slab], copies: Sequence[Slab]) -> None:
        self._left: list[tuple[Any, Any]] = []
        self._settled = threading.Event()
        for slab, copy in zip(slabs, copies, strict=True):
            if array_module(slab.data) is np:
                self._left.append((slab.data, copy.data))
            else:
                slab.data.get(out=copy.data)

    def finish(self, at: Callable[[str], None]) -> None:
        """Make the copies that are left; ``at`` is told the phase "snapshot" after each."""
        try:
            for source, copy in self._left:
                np.copyto(copy, source)  # lets go of Python's lock
                at("snapshot")
        finally:
            self._left = []
            self._settled.set()

    def settle(self) -> None:
        """Wait until there is nothing left to copy."""
        self._settled.wait()


def _clear(block: NDArray[np.uint8]) -> None:
    for at in range(0, block.size, BLOCK):
        check()
        block[at : at + BLOCK] = 0  # lets go of Python's lock


def _empty(size: int, pinned: bool) -> NDArray[np.uint8]:
    if not pinned:
        return np.empty(size, np.uint8)
    import cupyx  # ships with CuPy

    block: NDArray[np.uint8] = cupyx.empty_pinned((size,), np.uint8)
    return block
