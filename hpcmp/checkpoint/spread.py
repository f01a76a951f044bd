"""A checkpoint whose files are spread over the nodes of a job, some of them on several."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from . import manifest, moves, reader
from .agree import agreed
from .load import Checkpoint
from .manifest import Manifest
from .slab import Slab

if TYPE_CHECKING:
    from ..comm.mesh import Mesh

_log = logging.getLogger("hpcmp")


def team(mesh: Mesh) -> list[int]:
    """The ranks of this rank's node."""
    nodes = mesh.topology.nodes
    return [rank for rank, node in enumerate(nodes) if node == nodes[mesh.rank]]


def held(path: Path, content: Manifest) -> list[str]:
    """The files of ``content`` that are in ``path``, of the right length."""
    found = []
    for name, file in content.files.items():
        try:
            reader.check_size(path / name, file)
            found.append(name)
        except CheckpointError:
            continue
    return found


class SpreadCheckpoint(Checkpoint):
    """The checkpoint whose manifest is ``text``; ``path`` is this node's directory, with some of the files or none.

    ``load`` first fetches the files that this node's ranks need and that only others have. ``loaded`` is called at its
    end. The other methods read what is here. Raises CheckpointError if the text is no manifest.
    """

    def __init__(self, path: Path, text: bytes, mesh: Mesh, loaded: Callable[[Path], None]) -> None:
        super().__init__(path, manifest.parse(text, path / manifest.NAME), mesh)
        self._text, self._loaded, self._mesh, self._team = text, loaded, mesh, team(mesh)

    def load(self, slabs: Iterable[Slab], *, verify: bool = True) -> None:
        """As ``Checkpoint.load``. A file that is damaged is removed, and its copy on another node taken."""
        slabs = list(slabs)
        for last in (False, False, True):
            self._fetch(slabs)
            try:
                super().load(slabs, verify=verify)
                break
            except CheckpointError as error:
                if last or not self._weed():
                    raise
                if self._mesh.rank == 0:
                    _log.warning("%s; looking for its copy", error)
        self._loaded(self.path)

    def _fetch(self, slabs: Iterable[Slab]) -> None:
        """Have every file here that this node's ranks need."""
        nodes = self._mesh.topology.nodes
        told = self._mesh.gather_objects((self._wanted(slabs), held(self.path, self.manifest)))
        with agreed(self._mesh, self._failed):
            sizes = {name: file.bytes for name, file in self.manifest.files.items()}
            there = {nodes[rank]: names for rank, (_, names) in enumerate(told)}
            needed = moves.to_readers(nodes, sizes, [wanted for wanted, _ in told], there)
            if self._mesh.rank == self._team[0] and not (self.path / manifest.NAME).exists():
                self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
                (self.path / manifest.NAME).write_bytes(self._text)
        with agreed(self._mesh, self._failed):
            moves.make(needed, self.path, self._mesh)

    def _wanted(self, slabs: Iterable[Slab]) -> set[str]:
        """The files with a part of what ``slabs`` are to hold; what does not fit is for ``load`` to say."""
        wanted = set()
        for slab in slabs:
            region, tensor = slab.region(), self.manifest.tensors.get(slab.name)
            if region and tensor and tensor.shape == tuple(slab.shape):
                wanted |= {piece.file for piece in tensor.pieces if piece.region.intersection(region)}
        return wanted

    def _weed(self) -> bool:
        """Remove the damaged ones of the files here, each rank of the node looking at some; whether any rank did."""
        names = held(self.path, self.manifest)
        self._mesh.gather_objects(None)  # nobody removes what another has yet to list
        damaged = [
            name for name in names[self._team.index(self._mesh.rank) :: len(self._team)] if not self._sound(name)
        ]
        with agreed(self._mesh, self._failed):
            for name in damaged:
                (self.path / name).unlink()
        return any(self._mesh.gather_objects(damaged))

    def _sound(self, name: str) -> bool:
        try:
            for tensor, content in self.manifest.tensors.items():
                for piece in content.pieces:
                    if piece.file == name:
                        self.read(tensor, piece.region.relative((0,) * len(piece.start)))
        except CheckpointError:
            return False
        return True

    def _failed(self, who: str, why: str) -> CheckpointError:
        return CheckpointError(f"local checkpoint of step {self.step}: {who}{why}")
