"""A checkpoint whose files are spread over the nodes of a job, some of them on several."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CheckpointError
from ..plain import read_whole
from . import local_steps, manifest, moves
from .agree import agreed
from .load import Checkpoint
from .slab import Slab

if TYPE_CHECKING:
    from ..comm.mesh import Mesh

_COPIES = 2  # of a file that stay after a load: a node's own, and its partner's
_log = logging.getLogger("hpcmp")


def team(mesh: Mesh) -> list[int]:
    """The ranks of this rank's node."""
    nodes = mesh.topology.nodes
    return [rank for rank, node in enumerate(nodes) if node == nodes[mesh.rank]]


class SpreadCheckpoint(Checkpoint):
    """The checkpoint whose manifest is ``text``; ``path`` is this node's directory, with some of the files or none.

    ``load`` first fetches the files that this node's ranks need and that only others have. ``loaded`` is called at its
    end. The other methods read what is here. Raises CheckpointError if the text is no manifest.
    """

    def __init__(self, path: Path, text: bytes, mesh: Mesh, loaded: Callable[[Path], None]) -> None:
        super().__init__(path, manifest.parse(text, path / manifest.NAME), mesh)
        self._text, self._loaded, self._mesh, self._team = text, loaded, mesh, team(mesh)
        self._leads = mesh.rank == self._team[0]
        self._damaged: set[str] = set()  # of the files here
        self._surplus: set[str] = set()  # of the files here, once they are loaded

    def load(self, slabs: Iterable[Slab], *, verify: bool = True) -> None:
        """As ``Checkpoint.load``. The place of a file that is damaged is taken by its copy from another node."""
        slabs = list(slabs)
        for last in (False, False, True):
            try:
                self._fetch(slabs)
                super().load(slabs, verify=verify)
                break
            except CheckpointError as error:
                if last or not self._examine():
                    raise
                if self._mesh.rank == 0:
                    _log.warning("%s; looking for its copy", error)
        for name in self._surplus if self._leads else ():
            with suppress(OSError):
                (self.path / name).unlink()
        self._loaded(self.path)

    def _fetch(self, slabs: Iterable[Slab]) -> None:
        """Have every file here that this node's ranks need, and every file on two nodes."""
        nodes = self._mesh.topology.nodes
        with agreed(self._mesh, self._failed):
            if self._leads:
                local_steps.own(self.path.parent)
        here = [name for name in local_steps.held(self.path, self.manifest) if name not in self._damaged]
        told = self._mesh.gather_objects((self._wanted(slabs), here))
        with agreed(self._mesh, self._failed):
            sizes = {name: file.bytes for name, file in self.manifest.files.items()}
            there = {nodes[rank]: names for rank, (_, names) in enumerate(told)}
            needed = moves.to_readers(nodes, sizes, [wanted for wanted, _ in told], there)
            if self._leads:
                self._hold_manifest()
        with agreed(self._mesh, self._failed):
            moves.make(needed, self.path, self._mesh)
        copies = Counter(name for names in there.values() for name in names)
        for move in needed:
            copies[move.name] += 1
            if nodes[move.target] == nodes[self._mesh.rank]:
                self._damaged.discard(move.name)
                self._surplus.discard(move.name)
                if copies[move.name] > _COPIES:
                    self._surplus.add(move.name)

    def _hold_manifest(self) -> None:
        """Have the directory, and the manifest in it."""
        self.path.mkdir(mode=0o700, exist_ok=True)
        file = self.path / manifest.NAME
        with suppress(OSError):
            if read_whole(file, manifest.LIMIT) == self._text:
                return
        moves.place(file, self._text)

    def _wanted(self, slabs: Iterable[Slab]) -> set[str]:
        """The files with a part of what ``slabs`` are to hold; what does not fit is for ``load`` to say."""
        wanted = set()
        for slab in slabs:
            region, tensor = slab.region(), self.manifest.tensors.get(slab.name)
            if region and tensor and tensor.shape == tuple(slab.shape):
                wanted |= {piece.file for piece in tensor.pieces if piece.region.intersection(region)}
        return wanted

    def _examine(self) -> bool:
        """Find the damaged ones of the files on each node, whose ranks share the work; whether there are any that were
        not known. Nothing is removed: what cannot be read now may be read another time."""
        mine = self._team.index(self._mesh.rank)
        names = [name for name in local_steps.held(self.path, self.manifest) if name not in self._damaged]
        told = self._mesh.gather_objects([name for name in names[mine :: len(self._team)] if not self._sound(name)])
        self._damaged.update(name for rank in self._team for name in told[rank])
        return any(told)

    def _sound(self, name: str) -> bool:
        slabs = []
        for tensor, content in self.manifest.tensors.items():
            for piece in content.pieces:
                if piece.file == name:
                    index = piece.region.relative((0,) * len(piece.start))
                    numbers = np.broadcast_to(np.empty((), content.dtype), piece.count)  # which nobody looks at
                    slabs.append(Slab(tensor, content.shape, index, numbers))
        try:
            Checkpoint(self.path, self.manifest).check(slabs)
        except CheckpointError:
            return False
        return True

    def _failed(self, who: str, why: str) -> CheckpointError:
        return CheckpointError(f"local checkpoint of step {self.step}: {who}{why}")
