"""The local tier: fast copies of a run's state on the nodes, so that a restart needs no parallel file system."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, InputError
from . import directory, manifest, moves, share
from .agree import agreed, broadcast, gather
from .manifest import Manifest
from .plan import Plan
from .save import CheckpointSaveError
from .slab import Slab
from .spread import SpreadCheckpoint, held, team
from .storage import Storage
from .tiling import in_order, make_plan

if TYPE_CHECKING:
    from ..comm.mesh import Mesh

NAME = "local"  # of the file beside the ordinary checkpoints
KEPT = 2  # steps: one is whole while the next is written
_STEP = re.compile(r"(step_[0-9]{8,18})-[0-9a-f]{16}")
_STORAGE = Storage("files", verify="no")  # digests are compared when a file is read
_log = logging.getLogger("hpcmp")


def open_tier(folder: str, root: Path, mesh: Mesh, *, fresh: bool) -> LocalTier:
    """The local tier, in ``folder``, of the run whose ordinary checkpoints lie in ``root``.

    The file ``local`` there has the run's name: drawn when there is none yet, or the run begins anew (``fresh``).
    Collective. Raises InputError, the same on every rank.
    """
    with agreed(mesh, _unfit):
        name = _name(root / NAME, fresh) if mesh.rank == 0 else ""
    name = broadcast(mesh, name)
    with agreed(mesh, _unfit):
        tier = LocalTier(folder, name, mesh)
    return tier


class LocalTier:
    """Checkpoints of a run in a directory that each node has to itself: on its own disk, or in its memory (/dev/shm).

        tier.save(step, slabs, state)      # between two ordinary checkpoints
        tier.checkpoints(after=saved)      # at a restart: those that can be loaded, the newest first
        tier.clear()                       # at the end

    A step is an ordinary checkpoint with a file for each rank, spread over the nodes: a node's directory has the
    manifest, the files of its own ranks, and those of the node before. So any node may be lost, and more of them if no
    two are neighbours; on a single node there are no second copies.

    folder: the directory; $VARIABLES and "{node}" (the node's number) are filled in on each node. run: what tells the
    run's steps from others' in it. Methods are collective. What fails in ``save`` ends the tier, with a warning, never
    the run. Raises InputError for a variable that is not set.
    """

    def __init__(self, folder: str, run: str, mesh: Mesh) -> None:
        nodes = mesh.topology.nodes
        node = nodes[mesh.rank]
        place = os.path.expandvars(folder).replace("{node}", str(node))
        if "$" in place:
            raise InputError(f"{place} has a variable that is not set there")
        self.mesh, self.root, self.off = mesh, Path(place) / run, False
        self.leader = team(mesh)[0]  # does what is to be done once on a node
        self.leads = mesh.rank == self.leader
        self._plan: Plan | None = None
        self._kept: list[Path] = []

    def save(self, step: int, slabs: Iterable[Slab], state: dict[str, Any]) -> bool:
        """Save what ``hpcmp.checkpoint.save`` would, on the nodes; whether it is saved."""
        if self.off:
            return False
        try:
            self._save(step, slabs, state)
        except CheckpointSaveError as error:
            self.off = True
            if self.mesh.rank == 0:
                _log.warning("%s; there will be no more local checkpoints in this run", error)
        return not self.off

    def checkpoints(self, after: str = "") -> list[SpreadCheckpoint]:
        """Those saved after the time ``after`` of which every file is on some node, the newest first."""
        here = self._look() if self.leads else {}
        told = self.mesh.gather_objects({name: (c.saved, len(c.files), files) for name, (c, _, files) in here.items()})
        steps: dict[tuple[str, int, str], set[str]] = {}
        holder: dict[str, int] = {}
        for rank, there in enumerate(told):
            for name, (saved, count, files) in there.items():
                steps.setdefault((saved, count, name), set()).update(files)
                holder.setdefault(name, rank)
        found = []
        for (saved, count, name), have in sorted(steps.items(), reverse=True):
            if saved > after and len(have) == count:
                text = broadcast(self.mesh, here[name][1] if name in here else None, holder[name])
                found.append(SpreadCheckpoint(self.root / name, text, self.mesh, self.keep))
        return found

    def clear(self) -> None:
        """Remove all steps of the run."""
        if self.leads:
            self._prune(())
            try:
                self.root.rmdir()
            except OSError:  # it never was, or holds what is not ours
                pass

    def folder(self, step: int, text: bytes) -> Path:
        """This node's directory of the step whose manifest is ``text``."""
        return self.root / f"{directory.step_name(step)}-{sha256(text).hexdigest()[:16]}"

    def keep(self, path: Path) -> None:
        """Count ``path`` as the newest step; remove all but KEPT."""
        self._kept = [*self._kept, path][-KEPT:]
        if self.leads:
            self._prune(self._kept)

    def _save(self, step: int, slabs: Iterable[Slab], state: dict[str, Any]) -> None:
        mesh = self.mesh
        temporary: Path | None = None

        def at(phase: str) -> None:
            directory.failpoint(f"local {phase}", mesh.rank)

        failed = partial(_unsaved, step)
        try:
            with agreed(mesh, failed):
                parts = in_order(slabs)
                json.dumps(state, sort_keys=True)
            self._plan = make_plan(parts, _STORAGE.kind, mesh, self._plan, failed)
            with agreed(mesh, failed):
                if self.leads:
                    self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
                    temporary = directory.begin(self.root, step)
            folder = mesh.gather_objects(temporary)[self.leader]
            with agreed(mesh, failed):
                plan = replace(self._plan, tensors=None)  # no file that shows others: they are on other nodes
                share.lay_out(folder, plan, _STORAGE)
                written = share.write(folder, plan, parts, _STORAGE, None, at)
            sizes = mesh.gather_objects({name: file.bytes for name, file in written[0].items()})
            owners = {name: (rank, size) for rank, files in enumerate(sizes) for name, size in files.items()}
            with agreed(mesh, failed):
                moves.make(moves.to_partners(mesh.topology.nodes, owners), folder, mesh)
                at("move")
            gathered, text = gather(mesh, written), b""
            with agreed(mesh, failed):
                if mesh.rank == 0:
                    text = share.manifest(step, plan, gathered, state).render()
            text = broadcast(mesh, text)
            with agreed(mesh, failed):
                if self.leads:
                    at("manifest")
                    (folder / manifest.NAME).write_bytes(text)
                    _rename(folder, self.folder(step, text))
            self.keep(self.folder(step, text))
        except CheckpointSaveError:
            if temporary and temporary.exists():
                directory.discard(temporary)
            raise

    def _look(self) -> dict[str, tuple[Manifest, bytes, list[str]]]:
        """The steps on this node: name -> the manifest, its text, the files of it that are here."""
        found = {}
        for path in self._steps():
            try:
                content, _ = manifest.read(path / manifest.NAME)
                text = (path / manifest.NAME).read_bytes()
            except (CheckpointError, OSError):  # other nodes have it too
                continue
            if self.folder(content.step, text) == path:
                found[path.name] = content, text, held(path, content)
        return found

    def _steps(self) -> list[Path]:
        try:
            return [path for path in sorted(self.root.iterdir()) if _STEP.fullmatch(path.name)]
        except OSError:
            return []

    def _prune(self, kept: Collection[Path]) -> None:
        for path in self._steps():
            if path not in kept:
                try:  # under a name that is swept, should this process die now
                    path = path.rename(directory.hidden(self.root / path.name.partition("-")[0], "tmp"))
                except OSError:
                    continue
                directory.discard(path)


def _rename(folder: Path, final: Path) -> None:
    try:
        folder.rename(final)
    except OSError as error:
        raise OSError(f"{final}: {error.strerror}: is the directory of each node its own?") from None


def _unsaved(step: int, who: str, why: str) -> CheckpointSaveError:
    return CheckpointSaveError(f"the local checkpoint of step {step} is not saved: {who}{why}")


def _unfit(who: str, why: str) -> InputError:
    return InputError(f"checkpoint.local: {who}{why}")


def _name(path: Path, fresh: bool) -> str:
    if not fresh and path.exists():
        name = path.read_text(errors="replace").strip()
        if re.fullmatch("[0-9a-f]{16}", name):
            return name
    name = secrets.token_hex(8)
    path.write_text(f"{name}\n")
    return name
