"""Repacking: a checkpoint of one storage made into one of another, block by block."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from . import directory
from .agree import agreed
from .load import Checkpoint
from .save import save
from .slab import Index, Slab
from .storage import Storage

if TYPE_CHECKING:
    from ..comm.mesh import Mesh


def repack(checkpoint: Checkpoint, root: Path | str, storage: Storage | str) -> Path:
    """Save ``checkpoint`` again, in ``storage``, below ``root``: the same tensors, step and state. Returns its path.

    Collective over the mesh that the checkpoint was opened with, whose ranks share the tensors; none holds more than a
    block of one. All is checked before the first byte is written, and what is written as by ``save``. ``root`` may be
    the folder in which the checkpoint lies: the new one takes its place, as a step that is saved again. Raises
    CheckpointError if the checkpoint is damaged, CheckpointSaveError if the new one cannot be written, and InputError
    if the newest checkpoint below ``root`` is of another step: the run would go on from this one.
    """
    from ..comm.mesh import Mesh

    root, mesh = Path(root), checkpoint.mesh or Mesh()
    with agreed(mesh, lambda who, why: InputError(why)):
        directory.check_folder(root)
        if mesh.rank == 0 and directory.checkpoints(root):
            newest = directory.find(root)[1].step
            if newest != checkpoint.step:
                raise InputError(
                    f"{root}: its newest checkpoint is of step {newest}; one of step {checkpoint.step} would take its "
                    "place as the newest: choose another folder"
                )
    slabs = []
    for name in _share(checkpoint, mesh):
        shape, dtype = checkpoint.tensors[name]
        index = tuple(slice(0, n) for n in shape)
        slabs.append(Slab(name, shape, index, _Stored(checkpoint, name, shape, dtype)))
    checkpoint.check(slabs)
    return save(root, checkpoint.step, slabs, checkpoint.state, mesh, storage=storage, keep=None)


def _share(checkpoint: Checkpoint, mesh: Mesh) -> list[str]:
    """The tensors that this rank takes: the largest first, each to the rank that has least so far."""
    sizes = {name: dtype.itemsize * math.prod(shape) for name, (shape, dtype) in checkpoint.tensors.items()}
    loads = [(0, rank) for rank in range(mesh.size)]
    mine = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + sizes[name], rank))
        if rank == mesh.rank:
            mine.append(name)
    return mine


@dataclass(frozen=True)
class _Stored:
    """A tensor of a checkpoint as an array that is read when it is indexed."""

    checkpoint: Checkpoint
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __getitem__(self, index: Index) -> NDArray[Any]:
        return self.checkpoint.read(self.name, index, verify=False)  # checked before
