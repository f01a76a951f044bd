"""Opening and loading checkpoints: nothing is used before it has been checked."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from . import directory, manifest, reader
from .agree import agreed, broadcast
from .manifest import Manifest, Piece, Tensor
from .slab import Index, Region, Slab

if TYPE_CHECKING:
    from ..comm.mesh import Mesh

CONVERTIBLE = {"float32", "float64"}


def open_checkpoint(path: Path | str, mesh: Mesh | None = None) -> Checkpoint:
    """The checkpoint at ``path``: one step's directory, or a run's, of which the newest complete checkpoint is taken.

    In a run's directory that is the one that the file ``latest`` names; if it is not there or not complete, the one
    that was saved last (and a warning is logged). The manifest is checked whole, the data files for being there in full
    length. Only reads. With ``mesh`` collective: rank 0 looks, all get what it found. Raises CheckpointError, the same
    on all ranks.
    """
    found = None
    with agreed(mesh, _failed):
        if mesh is None or mesh.rank == 0:
            found = directory.find(Path(path))
    place, content = broadcast(mesh, found)
    return Checkpoint(place, content, mesh)


def _failed(who: str, why: str) -> CheckpointError:
    return CheckpointError(why)


@dataclass(frozen=True)
class Fill:
    """A region that goes from a piece into a slab."""

    slab: Slab
    tensor: Tensor
    piece: Piece
    region: Region


class Checkpoint:
    """A checkpoint open for reading, by ranks in any number and layout.

    path: its directory. step: the optimizer step. saved: when, in UTC (ISO 8601). state: what was given to ``save``.
    tensors: name -> (shape, dtype).
    """

    def __init__(self, path: Path, content: Manifest, mesh: Mesh | None = None) -> None:
        self.path, self.manifest, self.mesh = path, content, mesh
        self.step, self.saved, self.state = content.step, content.saved, content.state
        self.tensors = {name: (t.shape, np.dtype(t.dtype)) for name, t in content.tensors.items()}

    def load(self, slabs: Iterable[Slab], *, verify: bool = True) -> None:
        """Fill each slab's ``data`` with its part of the tensor of its name.

        First, all is checked: every name is there with the slab's shape; the dtype is the slab's, or float32 for
        float64 or the reverse; every piece that a slab touches has its digest (whole, also where the slab needs a part
        of it, unless ``verify`` is False). If anything is wrong on any rank, CheckpointError is raised on all and no
        array has changed. Then the arrays are filled, a block at a time: a slab on a GPU through the host. Collective
        if opened with a mesh.
        """
        with agreed(self.mesh, _failed):
            fills = self._plan(slabs)
            if verify:
                self._verify(fills)
        with agreed(self.mesh, lambda who, why: CheckpointError(f"{why} (some arrays are already overwritten)")):
            self._fill(fills)

    def check(self, slabs: Iterable[Slab]) -> None:
        """Do the first half of ``load``: CheckpointError, on all ranks, if not every slab could be filled with what
        was saved. Collective if opened with a mesh."""
        with agreed(self.mesh, _failed):
            self._verify(self._plan(slabs))

    def read(self, name: str, index: Index | None = None, *, verify: bool = True) -> NDArray[Any]:
        """The tensor ``name``, or the part of it at ``index``, on the host; checked as by ``load``. Not collective."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: there is no tensor {name}")
        shape, dtype = self.tensors[name]
        whole = tuple(slice(None) for _ in shape) if index is None else index
        index = tuple(slice(*s.indices(n)) for s, n in zip(whole, shape, strict=True))
        data = np.empty([max(0, s.stop - s.start) for s in index], dtype)
        fills = self._plan([Slab(name, shape, index, data)])
        if verify:
            self._verify(fills)
        self._fill(fills)
        return data

    def unused(self, names: Iterable[str]) -> list[str]:
        """The tensors that are in the checkpoint and not among ``names``."""
        return sorted(set(self.tensors) - set(names))

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Read every byte; a line for each thing that is wrong, naming file and tensor. Empty if all is sound.

        progress: is told, piece by piece, how many bytes of numbers have been read, of how many.
        """
        try:
            strange = {entry.name for entry in self.path.iterdir()} - {manifest.NAME, *self.manifest.files}
        except OSError as error:
            return [f"{self.path}: {error.strerror}"]
        problems = [f"{self.path / name}: not a part of this checkpoint" for name in sorted(strange)]
        groups: dict[str, list[tuple[Tensor, Piece]]] = {name: [] for name in self.manifest.files}
        for _, tensor in sorted(self.manifest.tensors.items()):
            for piece in tensor.pieces:
                groups[piece.file].append((tensor, piece))
        done, total = 0, sum(tensor.size * tensor.itemsize for tensor in self.manifest.tensors.values())
        for name, pairs in groups.items():
            try:
                with self._open(name) as file:
                    file.look_up(self._dataset(*pair)[:3] for pair in pairs)
                    for tensor, piece in pairs:
                        try:
                            self._check(file, tensor, piece)
                        except CheckpointError as error:
                            problems.append(str(error))
                        done += piece.region.size * tensor.itemsize
                        if progress:
                            progress(done, total)
            except CheckpointError as error:
                problems.append(str(error))
        return problems

    def _plan(self, slabs: Iterable[Slab]) -> list[Fill]:
        """What goes where, in the order of files; CheckpointError if a slab does not fit the tensor of its name."""
        wanted = [(slab, region) for slab in slabs if (region := slab.region())]
        missing = sorted({slab.name for slab, _ in wanted} - set(self.tensors))
        if missing:
            more = f" (and {len(missing) - 1} more are not there)" if len(missing) > 1 else ""
            raise CheckpointError(f"{self.path}: there is no tensor {missing[0]}{more}")
        fills = []
        for slab, region in wanted:
            tensor = self.manifest.tensors[slab.name]
            if tensor.shape != tuple(slab.shape):
                raise CheckpointError(
                    f"{self.path}: {slab.name} has shape {tensor.shape}, the model {tuple(slab.shape)}"
                )
            if slab.data.dtype.name != tensor.dtype and not {slab.data.dtype.name, tensor.dtype} <= CONVERTIBLE:
                have = f"{slab.name} has dtype {tensor.dtype}, the model {slab.data.dtype}"
                raise CheckpointError(f"{self.path}: {have}: only float32 and float64 are converted")
            for piece in tensor.pieces:
                if shared := piece.region.intersection(region):
                    fills.append(Fill(slab, tensor, piece, shared))
        return sorted(fills, key=lambda fill: (fill.piece.file, fill.piece.dataset, fill.region.start))

    def _verify(self, fills: Sequence[Fill]) -> None:
        for name, group in itertools.groupby(fills, lambda fill: fill.piece.file):
            with self._open(name) as file:
                pieces = dict.fromkeys((fill.tensor, fill.piece) for fill in group)
                file.look_up(self._dataset(*pair)[:3] for pair in pieces)
                for tensor, piece in pieces:
                    self._check(file, tensor, piece)

    def _check(self, file: reader.OpenFile, tensor: Tensor, piece: Piece) -> None:
        if file.digest(*self._dataset(tensor, piece), piece.region) != piece.digest:
            raise CheckpointError(
                f"{file.path}: {piece.dataset}: damaged: its numbers have changed since they were saved"
            )

    def _fill(self, fills: Sequence[Fill]) -> None:
        for name, group in itertools.groupby(fills, lambda fill: fill.piece.file):
            with self._open(name) as file:
                for fill in group:
                    target = fill.slab.data[(*fill.region.relative([s.start for s in fill.slab.index]), ...)]
                    file.fill(target, *self._dataset(fill.tensor, fill.piece), fill.region)

    def _open(self, name: str) -> reader.OpenFile:
        return reader.open_checked(self.path / name, self.manifest.files[name], self.manifest.algorithm)

    def _dataset(self, tensor: Tensor, piece: Piece) -> tuple[str, tuple[int, ...], str, tuple[int, ...]]:
        shape, origin = self.manifest.dataset_shape(tensor, piece), self.manifest.origin(piece)
        return piece.dataset, shape, tensor.dtype, origin
