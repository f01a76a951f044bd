"""The local tier: fast copies of a run's state on the nodes, so that a restart needs no parallel file system."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..plain import read_whole
from . import directory, local_steps, lock, manifest, moves, share
from .agree import agreed, broadcast, gather
from .plan import Plan
from .save import CheckpointSaveError
from .slab import Slab
from .spread import SpreadCheckpoint, team
from .storage import Storage
from .tiling import in_order, make_plan

if TYPE_CHECKING:
    from ..comm.mesh import Mesh

NAME = "local"  # of the file beside the ordinary checkpoints
KEPT = 2  # steps that are on the disk at any moment, the one included that is being written
_STORAGE = Storage("files", verify="no")  # digests are compared when a file is read
_log = logging.getLogger("hpcmp")


def open_tier(folder: str, root: Path, mesh: Mesh, *, fresh: bool) -> LocalTier:
    """The local tier, in ``folder``, of the run whose ordinary checkpoints lie in ``root``.

    The file ``local`` there has the run's name: drawn when there is none, or the run begins anew (``fresh``); what is
    here under the name before is removed once there is a step under the new one. Collective. Raises InputError, the
    same on every rank.
    """
    named = "", ""
    with agreed(mesh, _unfit):
        if mesh.rank == 0:
            named = _name(root / NAME, fresh)
    name, before = broadcast(mesh, named)
    with agreed(mesh, _unfit):
        tier = LocalTier(folder, name, mesh, root)
        if before and before != name:
            tier.former = LocalTier(folder, before, mesh)
    tier.known = before == name
    return tier


def local_folder(folder: str, node: int) -> Path:
    """``checkpoint.local`` on a node, $VARIABLES and "{node}" filled in. Raises InputError for one that is not set."""
    place = os.path.expandvars(folder).replace("{node}", str(node))
    if "$" in place:
        raise InputError(f"{place} has a variable that is not set there")
    return Path(place).expanduser()


class LocalTier:
    """Checkpoints of a run in a directory that each node has to itself: on its own disk, or in its memory (/dev/shm).

        tier.save(step, slabs, state)      # between two ordinary checkpoints
        tier.checkpoints()                 # at a restart: those that can be loaded, the newest first
        tier.clear()                       # at the end

    A step is an ordinary checkpoint with a file for each rank, spread over the nodes: a node's directory has the
    manifest, the files of its own ranks, and those of the node before. So any node may be lost, and more of them if no
    two are neighbours; on a single node there are no second copies. At no moment are there more than two steps: what a
    node holds is four times what its ranks own, on nodes that are alike.

    folder: the directory; $VARIABLES and "{node}" (the node's number) are filled in on each node. run: what tells the
    run's steps from others' in it: nothing is read, written or removed but in its directory, which must be this user's
    alone. home: where the run's ordinary checkpoints lie, if it has its lock. Methods are collective. What fails in
    ``save`` ends the tier, with a warning, never the run. Raises InputError for a variable that is not set.

    known: whether the run may have saved in it before. former: the tier of the name that the run had before.
    """

    def __init__(self, folder: str, run: str, mesh: Mesh, home: Path | None = None) -> None:
        self.mesh, self.home, self.off, self.known = mesh, home, False, False
        self.root = local_folder(folder, mesh.topology.nodes[mesh.rank]) / run
        self.former: LocalTier | None = None
        self.leader = team(mesh)[0]  # does what is to be done once on a node
        self.leads = mesh.rank == self.leader
        self._plan: Plan | None = None
        self._kept: list[Path] = []
        self._told = False

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
        """Those of which every file is on some node, the last one saved first.

        after: when the newest ordinary checkpoint was saved. It is told if one that was saved later is not whole any
        more, or if nothing is left.
        """
        here = local_steps.look(self.root) if self.leads else {}
        told = self.mesh.gather_objects({name: (c.saved, len(c.files), files) for name, (c, _, files) in here.items()})
        steps: dict[tuple[str, int, str], set[str]] = {}
        holder: dict[str, int] = {}
        for rank, there in enumerate(told):
            for name, (saved, count, files) in there.items():
                steps.setdefault((saved, count, name), set()).update(files)
                holder.setdefault(name, rank)
        found = []
        for (saved, count, name), have in sorted(steps.items(), reverse=True):
            if len(have) == count:
                text = broadcast(self.mesh, here[name][1] if name in here else None, holder[name])
                found.append(SpreadCheckpoint(self.root / name, text, self.mesh, self._keep))
            elif self.mesh.rank == 0 and saved > after and not found:
                step, lost = int(name[5:].partition("-")[0]), count - len(have)
                _log.warning("local checkpoint of step %d: %d of its %d files are on no node here", step, lost, count)
        if self.known and not steps and self.mesh.rank == 0:
            _log.warning("checkpoint.local: there is no step of this run on its nodes")
        self._kept = [checkpoint.path for checkpoint in found[:1]]
        return found

    def clear(self) -> None:
        """Remove all steps of the run, and its name."""
        if self.leads:
            local_steps.prune(self.root, ())
            with suppress(OSError):  # it never was, or holds what is not ours
                self.root.rmdir()
        self.mesh.gather_objects(None)
        if self.home and self.mesh.rank == 0:
            with suppress(OSError):
                (self.home / NAME).unlink()

    def _keep(self, *paths: Path) -> None:
        """Remove all steps but these."""
        self._kept = list(paths)
        if self.leads:
            local_steps.prune(self.root, self._kept)

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
                if self.home and mesh.rank == 0:
                    lock.check(self.home)
                if self.leads:
                    local_steps.own(self.root)
                    local_steps.prune(self.root, self._kept[1 - KEPT :])
            with agreed(mesh, failed):
                if self.leads:
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
            final = local_steps.folder(self.root, step, text)
            with agreed(mesh, failed):
                if self.leads:
                    at("manifest")
                    (folder / manifest.NAME).write_bytes(text)
                    local_steps.commit(folder, final)
            self._keep(*self._kept[1 - KEPT :], final)
            self._tell(owners)
        except CheckpointSaveError:
            if temporary and temporary.exists():
                directory.discard(temporary)
            raise

    def _tell(self, owners: dict[str, tuple[int, int]]) -> None:
        """Once: what this takes of a disk, or of the memory. And what was under a former name goes."""
        if self.former:
            self.former.clear()
            self.former = None
        if self.mesh.rank or self._told:
            return
        self._told, nodes = True, self.mesh.topology.nodes
        sizes = [0] * (max(nodes) + 1)
        for rank, size in owners.values():
            sizes[nodes[rank]] += size
        most = max(size + (sizes[node - 1] if len(sizes) > 1 else 0) for node, size in enumerate(sizes))
        _log.info("checkpoint.local: %.1f MB at most on a node, in %s", KEPT * most / 1e6, self.root)


def _unsaved(step: int, who: str, why: str) -> CheckpointSaveError:
    return CheckpointSaveError(f"the local checkpoint of step {step} is not saved: {who}{why}")


def _unfit(who: str, why: str) -> InputError:
    return InputError(f"checkpoint.local: {who}{why}")


def _name(path: Path, fresh: bool) -> tuple[str, str]:
    """The run's name, and the one that it had before, or ""."""
    try:
        before = read_whole(path, 64).decode(errors="replace").strip()
    except OSError:  # there is none
        before = ""
    before = before if re.fullmatch("[0-9a-f]{16}", before) else ""
    if before and not fresh:
        return before, before
    name = secrets.token_hex(8)
    moves.place(path, f"{name}\n".encode())
    return name, before
