"""The checkpoints that a run writes: behind its steps or at once, and what is told of each."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoint import Checkpoint, CheckpointSaveError, Keep, Saved, Saver, Storage, open_checkpoint
from ..checkpoint.agree import agreed
from ..checkpoint.directory import scan
from ..checkpoint.manifest import Manifest
from ..checkpoint.tier import LocalTier, open_tier
from ..errors import CheckpointError, InputError
from .config import Config
from .engine import Engine
from .inputs import Inputs
from .metrics import Metrics
from .state import begin_anew, check_same_model, resume, save_slabs

log = logging.getLogger("hpcmp")


class Saving:
    """Saves a run's checkpoints in ``root``, and tells of each: a line of the log, a record of the metrics.

    last: (step, path) of the newest that is committed; None if there is none. behind: whether those on the way are
    written while the training goes on (``checkpoint.asynchronous``). tier: of checkpoints on the nodes (
    ``checkpoint.local``), or None. facts: given whether what is saved is ranked by its loss, gives
    what else the state holds. held, slowest: the seconds that all saves have held up the steps, and that the longest of
    them took, 0 before the first. All methods but ``abandon`` are collective.
    """

    def __init__(self, engine: Engine, inputs: Inputs, config: Config, root: Path, metrics: Metrics) -> None:
        c = config.checkpoint
        self.engine, self.inputs, self.config, self.metrics = engine, inputs, config, metrics
        self.logs = engine.mesh.rank == 0
        storage, keep = Storage(c.storage, c.verify, c.alignment, c.hints), Keep(c.keep, c.keep_every, c.keep_best)
        self.saver = Saver(root, engine.mesh, storage=storage, keep=keep)
        self.last: tuple[int, Path] | None = None
        self._found: list[tuple[str, int, Path]] = []  # when each in ``root`` was saved, "" if it is not complete
        self.facts: Callable[[bool], dict[str, Any]] = lambda rated: {}
        self.tier: LocalTier | None = None
        if c.local:
            self.tier = open_tier(c.local, root, engine.mesh, fresh=not c.resume)
        self.behind = c.asynchronous and c.storage != "mpio"
        self._pressed = False
        self.held = self.slowest = 0.0
        if self.behind:
            self.saver.prepare(self._slabs())
        engine.before_update = self.saver.settle
        if c.asynchronous and not self.behind and self.logs:
            log.warning('checkpoint.asynchronous: in checkpoint.storage = "mpio" all ranks write together: steps wait')

    def now(self, step: int) -> Path:
        """Save the state after ``step`` steps; returns the checkpoint's folder. Raises CheckpointSaveError."""
        self.finish()
        return self._tell(self.saver.save(step, self._slabs(), self._state()))

    def begin(self, step: int) -> None:
        """Begin to save the state after ``step`` steps behind those that follow, once the save before has ended."""
        before, start = self.saver.running, time.perf_counter()
        self.finish()
        if before is not None and not self._pressed and self.logs:
            waited, every = time.perf_counter() - start, self.config.checkpoint.every
            log.warning(
                "step %d: waited %.1f s for the checkpoint of step %d to be written, with checkpoint.every = %s; "
                "this is not said again",
                *(step, waited, before, every),
            )
        self._pressed = self._pressed or before is not None
        self.saver.begin(step, self._slabs(), self._state())

    def poll(self) -> None:
        """Between steps: see whether the save behind them is committed. One that has failed is told."""
        with self.going_on():
            if done := self.saver.poll():
                self._tell(done)

    def finish(self) -> None:
        """Wait for the save behind the steps, if there is one. One that has failed is told."""
        with self.going_on():
            if done := self.saver.wait():
                self._tell(done)

    def local(self, step: int) -> None:
        """Save the state after ``step`` steps on the nodes; if that fails, it is told, and not tried again."""
        start = time.perf_counter()
        if self.tier and self.tier.save(step, self._slabs(), self._state(rated=False)) and self.logs:
            tokens = step * self.config.train.batch * self.config.model.sequence
            self.metrics.write({"step": step - 1, "tokens": tokens, "local_seconds": time.perf_counter() - start})

    def resume(self) -> Checkpoint | None:
        """Go on from the newest checkpoint that is whole, if there is any; a damaged one is named and passed over."""
        sources, mesh = self._sources(), self.engine.mesh
        for source in sources:
            try:
                checkpoint = open_checkpoint(source, mesh) if isinstance(source, Path) else source
                with agreed(mesh, lambda who, why: InputError(f"{who}{why}")):
                    check_same_model(checkpoint, self.config)
                    self.inputs.sampler.load_state_dict(checkpoint.state["sampler"])
                resume(checkpoint, self.engine, self.config)
            except CheckpointError as error:
                last = source is sources[-1]
                if last and any(isinstance(each, Path) for each in sources):
                    raise
                if self.logs:
                    log.warning("%s; %s", error, "the run begins anew" if last else "trying the one before")
                continue
            # Of those in the directory, what was saved later was not sound.
            sound = ((step, path) for saved, step, path in self._found if "" < saved <= checkpoint.saved)
            self.last = next(sound, None)
            if self.logs:
                log.info("resumed from %s (step %d)", checkpoint.path, checkpoint.step)
            return checkpoint
        if sources:  # they were all local, which ends no run
            self.inputs.sampler.samples = 0
            begin_anew(self.engine)
        return None

    def _sources(self) -> list[Checkpoint | Path]:
        """What the run can go on from, the last one saved first: checkpoints on the nodes, and in ``root``, of which
        those that are not complete stand at the end."""
        root, mesh, found = self.saver.root, self.engine.mesh, self._found
        with agreed(mesh, lambda who, why: CheckpointError(f"{who}{why}")):
            for path, entry in scan(root) if mesh.rank == 0 else ():
                found.append((entry.saved, entry.step, path) if isinstance(entry, Manifest) else ("", 0, path))
        self._found = found = mesh.gather_objects(found)[0]
        local = self.tier.checkpoints(after=found[0][0] if found else "") if self.tier else []
        timed: list[tuple[str, Checkpoint | Path]] = [(c.saved, c) for c in local]
        timed += [(saved, path) for saved, _, path in found]
        return [source for _, source in sorted(timed, key=lambda each: each[0], reverse=True)]

    def forget_local(self) -> None:
        """Remove what there is of the run on the nodes: it has a later checkpoint."""
        if self.tier:
            self.tier.clear()

    def abandon(self) -> None:
        """After an error on this rank: give up the save behind the steps, waiting for nobody."""
        self.saver.abandon()

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """A save in the body that fails is told: what went before is kept, and a full disk may not be so later."""
        try:
            yield
        except CheckpointSaveError as error:
            if self.logs:
                log.warning("%s; training goes on, %s", error, self.last_known())

    def last_known(self) -> str:
        """Where the run could go on from."""
        return f"the last checkpoint is {self.last[1]}" if self.last else "there is no checkpoint yet"

    def _slabs(self) -> Iterator[Any]:
        return save_slabs(self.engine, self.inputs.tokenizer)

    def _state(self, rated: bool = True) -> dict[str, Any]:
        return {
            "hpcmp": __version__,
            "config": self.config.to_dict(),
            "optimizer_steps": self.engine.optimizer.steps,
            "loss_scale": self.engine.loss_scale.state(),
            "sampler": self.inputs.sampler.state_dict(),
            "layout": dataclasses.asdict(self.config.layout),
        } | self.facts(rated)

    def _tell(self, done: Saved) -> Path:
        self.last = done.step, done.path
        self.held, self.slowest = self.held + done.held, max(self.slowest, done.seconds)
        if self.logs:
            train = self.config.train
            tokens = done.step * train.batch * self.config.model.sequence
            times = {"save_seconds": done.seconds, "held_up_seconds": done.held}
            self.metrics.write({"step": done.step - 1, "tokens": tokens, "checkpoint": done.path.name, **times})
            names = done.step, train.steps, done.path, done.seconds, done.held
            log.info("step %d/%d  saved %s in %.1f s (training held up for %.2f s)", *names)
        return done.path
