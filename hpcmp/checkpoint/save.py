"""Saving a checkpoint: all of it, or nothing that anyone could mistake for one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..errors import HpcmpError, InputError
from . import background, directory, share
from .agree import agreed, broadcast, gather
from .background import Task
from .plan import Plan
from .retention import Keep, prune
from .slab import Slab
from .snapshot import Copying, Memory, Snapshot
from .storage import Storage
from .tiling import in_order, make_plan

if TYPE_CHECKING:
    from ..comm.mesh import Mesh

T = TypeVar("T")


class CheckpointSaveError(HpcmpError):
    """A checkpoint could not be written, on every rank alike; the message names rank, file and reason.

    What was written of it is removed, and every earlier checkpoint is as it was.
    """


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint: its step, its path, and the seconds from the call to the commit, as far as the caller
    could see (at a ``poll``); ``held``: those of them in which this rank was held up."""

    step: int
    path: Path
    seconds: float
    held: float


def save(
    root: Path | str,
    step: int,
    slabs: Iterable[Slab],
    state: dict[str, Any],
    mesh: Mesh,
    *,
    storage: Storage | str = "auto",
    keep: Keep | int | None = 2,
) -> Path:
    """Save ``slabs`` and ``state`` as ``root/step_<step>``; returns that path. Collective. See ``Saver``."""
    return Saver(root, mesh, storage=storage, keep=keep).save(step, slabs, state).path


class Saver:
    """Saves checkpoints in the directory ``root``: at once, or behind the training that goes on.

        saver.save(step, slabs, state)      # returns when it is committed

        saver.begin(step, slabs, state)     # returns at once
        saver.settle()                      # before anything writes to the slabs' arrays: waits until they are copied
        saver.poll()                        # between steps: what is committed by now, or None
        saver.wait()                        # at the end: waits until there is nothing to poll for

    slabs: what this rank writes. Over all ranks the slabs of a name tile its shape exactly once; empty ones are
    dropped, and a rank may have none. state: anything JSON can hold, the same on all ranks (rank 0's is stored).
    storage: a ``Storage``, or its kind: "auto" means a file for each rank. keep: a ``Keep``, or how many
    checkpoints stay, this one included; None for all. A checkpoint of the same step is replaced.

    All methods but ``prepare``, ``settle`` and ``abandon`` are collective, and raise CheckpointSaveError, the same on
    all ranks, if the save fails: then there is none any more, and nothing else has changed. In the background a rank
    needs memory for a copy of its slabs, which is kept for the next save. One save at a time, and one saver of a
    directory.

    The order of things is in docs/checkpoints.md: a crash at any moment leaves this checkpoint or the one before it.
    Raises InputError for a wrong ``storage``, ``keep`` or ``step``.
    """

    def __init__(
        self, root: Path | str, mesh: Mesh, *, storage: Storage | str = "auto", keep: Keep | int | None = 2
    ) -> None:
        self.root, self.mesh = Path(root), mesh
        self.keep = None if keep is None else Keep.of(keep)
        self.storage = Storage.of(storage)
        self.storage.check(mesh)
        self._failpoint = partial(directory.failpoint, rank=mesh.rank)
        self._plan: Plan | None = None
        self._memory = Memory()
        self._saving: Generator[None, None, Path] | None = None
        self._copying: Copying | None = None
        self._task: Task[Any] | None = None
        self._blocking = False
        self._step, self._began, self._held = 0, 0.0, 0.0

    @property
    def running(self) -> int | None:
        """The step whose save has begun and not ended, as far as ``poll`` and ``wait`` know; else None."""
        return None if self._saving is None else self._step

    def save(self, step: int, slabs: Iterable[Slab], state: dict[str, Any]) -> Saved:
        """Save, and return when the checkpoint is committed."""
        self._start(step, slabs, state, behind=False)
        done = self._advance()
        assert done is not None  # nothing was left to a thread
        return done

    def prepare(self, slabs: Iterable[Slab]) -> None:
        """Have the memory at hand for slabs that are going to be saved in the background. Not collective.

        Without it the first such save is held up for longer. A rank that has too little memory says so when it saves.
        """
        with suppress(MemoryError):
            self._memory.prepare([slab for slab in slabs if slab.data.size])

    def begin(self, step: int, slabs: Iterable[Slab], state: dict[str, Any]) -> None:
        """Begin to save in the background. Until ``settle`` returns, nothing may write to the slabs' arrays.

        Raises InputError for storage "mpio", whose ranks write together.
        """
        if self.storage.kind == "mpio":
            raise InputError("storage mpio cannot be written in the background: its ranks write together")
        self._start(step, slabs, state, behind=True)
        self._advance()

    def settle(self) -> None:
        """Wait until this rank's slabs are copied, so that they may change. At other times nothing."""
        if self._copying is not None:
            start = time.perf_counter()
            self._copying.settle()
            self._copying = None
            self._held += time.perf_counter() - start

    def poll(self) -> Saved | None:
        """Take the save in the background further, if it is ready for that; returns it once it is committed.

        Does not wait for a disk. While a save is running, one sum of one number over all ranks.
        """
        return self._advance()

    def wait(self) -> Saved | None:
        """Wait until the save in the background is committed; None if there is none."""
        self._blocking = True
        try:
            return self._advance()
        finally:
            self._blocking = False

    def abandon(self) -> None:
        """Give up the save in the background, on this rank alone: it waits for no other rank, nor long for a disk.

        What there is of it is removed when something is saved in this directory again.
        """
        self._saving, self._copying = None, None
        if self._task is not None:
            self._task.give_up()
            self._task = None

    def _start(self, step: int, slabs: Iterable[Slab], state: dict[str, Any], behind: bool) -> None:
        if self._saving is not None:
            raise RuntimeError(f"the save of step {self._step} has not ended: wait() comes before the next")
        if step < 0:
            raise InputError(f"a checkpoint's step must be 0 or more, not step={step}")
        self._step, self._began, self._held = int(step), time.perf_counter(), 0.0
        self._saving = self._phases(slabs, state, behind)

    def _advance(self) -> Saved | None:
        """Run the save to where it has to wait for threads; with ``_blocking``, to its end."""
        if self._saving is None:
            return None
        start, saving = time.perf_counter(), self._saving
        self._saving = None  # unless it goes on
        try:
            next(saving)
        except StopIteration as end:
            now = time.perf_counter()
            return Saved(self._step, end.value, now - self._began, self._held + now - start)
        self._saving = saving
        self._held += time.perf_counter() - start
        return None

    def _phases(self, slabs: Iterable[Slab], state: dict[str, Any], behind: bool) -> Generator[None, None, Path]:
        """A save from its beginning to its end; yields while there is work left to threads (``behind``)."""
        mesh, step = self.mesh, self._step
        temporary: Path | None = None
        try:
            with agreed(mesh, self._failed):
                mine = in_order(slabs)
                state = json.loads(json.dumps(state, sort_keys=True))
            plan = self._plan = make_plan(mine, self.storage.kind, mesh, self._plan, self._failed)
            with agreed(mesh, self._failed):
                if mesh.rank == 0:
                    temporary = directory.begin(self.root, step)
                self._failpoint("create")
                if behind:
                    copies = self._memory.like(mine)
                    self._copying = Copying(mine, copies)
                    mine = copies
            folder = broadcast(mesh, temporary)
            snapshot = Snapshot(step, tuple(mine), state, datetime.now(UTC))
            yield from self._agreed(partial(self._lay_out, folder, plan, self._copying), behind)
            written = yield from self._agreed(partial(self._write, folder, plan, snapshot), behind)
            gathered = gather(mesh, written)
            yield from self._agreed(partial(self._commit, folder, plan, gathered, snapshot), behind)
        except CheckpointSaveError:
            if temporary and temporary.exists():
                directory.discard(temporary)
            raise
        finally:
            self._copying = None
        if mesh.rank:
            self._failpoint("prune")
        return self.root / directory.step_name(step)

    def _lay_out(self, folder: Path, plan: Plan, copying: Copying | None) -> None:
        if copying:
            copying.finish(self._at)
        share.lay_out(folder, plan, self.storage)

    def _write(self, folder: Path, plan: Plan, snapshot: Snapshot) -> share.Written:
        return share.write(folder, plan, snapshot.slabs, self.storage, self.mesh, self._at)

    def _commit(self, folder: Path, plan: Plan, gathered: list[share.Written], snapshot: Snapshot) -> None:
        """What is left to rank 0 when all ranks have written. Not to be given up half way."""
        if self.mesh.rank == 0:
            final = self.root / snapshot.name
            text = share.manifest(snapshot.step, plan, gathered, snapshot.state, snapshot.taken).render()
            directory.commit(folder, final, text, self._failpoint)
            self._failpoint("prune")
            if self.keep is not None:
                prune(self.root, self.keep, final)

    def _agreed(self, work: Callable[[], T], behind: bool) -> Generator[None, None, T]:
        """What ``work`` returns, when it has ended on every rank; ``behind``: done in a thread, which yields till then.

        What it raises on any rank is raised on all.
        """
        if behind:
            self._task = task = Task(work)
            ranks = self.mesh[self.mesh.axes]
            while True:
                if self._blocking:
                    task.finish()
                working = ranks.all_reduce(np.array([float(task.is_alive())]), "max")
                if not self._blocking:
                    yield  # at the next poll all have long given their answer, and nobody waits for the slowest
                if not working.wait()[0]:
                    break
            self._task, work = None, task.result
        with agreed(self.mesh, self._failed):
            result = work()
        return result

    def _at(self, phase: str) -> None:
        """Where work can be given up, or killed in a test."""
        self._failpoint(phase)
        background.check()

    def _failed(self, who: str, why: str) -> CheckpointSaveError:
        return CheckpointSaveError(f"{self.root}: step {self._step} is not saved: {who}{why}")
