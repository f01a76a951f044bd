"""Trainer: a configuration, a communicator, and the run from its newest checkpoint to its end."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..checkpoint import CheckpointSaveError, checkpoints, open_checkpoint, save
from ..checkpoint.agree import agreed
from ..errors import CheckpointError, HpcmpError, InputError
from .config import Config
from .engine import Engine, Result, mesh_for
from .inputs import Inputs
from .layout import short
from .measure import measured_before
from .metrics import Metrics, Progress, peak_flops, plot
from .state import check_same_model, load_slabs, save_slabs

if TYPE_CHECKING:
    from mpi4py import MPI

log = logging.getLogger("hpcmp")


class Trainer:
    """Trains as ``config`` says on the ranks of ``comm`` (None: this process alone), which is duplicated, not used.

        with Trainer(config, comm) as trainer:
            for result in trainer:          # one optimizer step each, to train.steps
                ...

    On entry the run goes on from the newest checkpoint, whatever layout wrote it. Steps, samples and random numbers are
    those of the serial run on every layout; on the same layout a continued run equals the uninterrupted one bit for
    bit. All methods are collective. Raises InputError, the same on every rank, for what the user can mend.
    """

    def __init__(self, config: Config, comm: MPI.Intracomm | None = None) -> None:
        self.config = config.resolved(ranks=1 if comm is None else comm.size)
        train = self.config.train
        self.mesh = mesh_for(self.config, comm)
        with self._agreed():
            self.inputs = Inputs(self.config, self.mesh)
            self.config = self.config.resolved(vocabulary=self.inputs.vocabulary)
            self._open_directory()
        again = self.config.checkpoint.resume and checkpoints(self.checkpoints)
        self.config = measured_before(self.config, self.mesh, self.directory / "config.toml" if again else None)
        self.engine = Engine(self.config, self.mesh)
        self.config = self.engine.config
        if self.logs:
            (self.directory / "config.toml").write_text(self.config.to_toml(), encoding="utf-8")
        self.step = 0
        self.reason = "finished"
        self._stop = False
        self._began = time.perf_counter()
        self._saved: tuple[int, Path] | None = None
        self._evaluated: tuple[int, float] | None = None
        if self.config.checkpoint.resume:
            self._resume()
        if self.logs:
            self.metrics.forget_after(self.step)
        peak = sum(self.mesh.gather_objects(peak_flops(self.engine.xp, self.engine.dtype)))
        flops = self.engine.architecture.flops_per_token(self.config.model.sequence)
        self.tokens = train.batch * self.config.model.sequence
        self.progress = Progress(train.steps, self.tokens, flops, peak, self.config.run.log_seconds, self.step)

    @property
    def logs(self) -> bool:
        """Whether this rank speaks for the run."""
        return self.mesh.rank == 0

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.inputs.close()
        if exc[0] is None:  # freeing is collective: after an error the other ranks may not come
            self.mesh.close()

    def request_stop(self, reason: str = "asked to stop") -> None:
        """Stop after the step at hand, with a checkpoint: all ranks agree. Safe in a signal handler."""
        self.reason, self._stop = reason, True

    def __iter__(self) -> Iterator[Result]:
        """Step to ``train.steps``, or until a stop is asked for; evaluate and save on the way as configured."""
        c = self.config
        while self.step < c.train.steps:
            limit = c.train.minutes
            if limit is not None and time.perf_counter() - self._began > 60 * limit:
                self.request_stop(f"train.minutes = {limit:g} are over")
            start = time.perf_counter()
            result = self.engine.step(self.step, *self.inputs.train.next(), stop=self._stop)
            if not math.isfinite(result.norm) and not result.skipped:
                raise HpcmpError(f"step {self.step}: loss {result.loss}, gradient norm {result.norm}; {self._last()}")
            self.step += 1
            self._record(result, time.perf_counter() - start)
            if c.run.evaluate_every and self.step % c.run.evaluate_every == 0:
                self.evaluate()
            if c.checkpoint.every and self.step % c.checkpoint.every == 0:
                self._save_if_possible()
            yield result
            if result.stop:
                self.reason = self._why()
                return

    def _why(self) -> str:
        """Why the run stops: the reason of the first rank that asked for it."""
        reasons = self.mesh.gather_objects(self.reason if self._stop else "")
        return next((reason for reason in reasons if reason), "asked to stop")

    def train(self) -> dict[str, Any]:
        """Run to the end, save, evaluate, and return the summary."""
        self._say_hello()
        loss, first = math.nan, self.step
        for result in self:
            loss = result.loss
        held_out = self.evaluate()
        if self._saved is None or self._saved[0] != self.step:
            self.save()
        seconds = time.perf_counter() - self.progress.began
        per_second, share = self.progress.rates(self.step - first, seconds)
        summary = {
            "step": self.step,
            "steps": self.config.train.steps,
            "finished": self.step >= self.config.train.steps,
            "reason": "finished" if self.step >= self.config.train.steps else self.reason,
            "loss": loss if math.isfinite(loss) else None,
            "held_out_loss": held_out,
            "seconds": seconds,
            "tokens_per_second": per_second,
            "share_of_peak": share,
            "parameters": self.engine.architecture.parameters,
            "layout": dataclasses.asdict(self.config.layout),
            "checkpoint": str(self._saved[1]) if self._saved else None,
            "metrics": str(self.metrics.path),
        }
        if self.config.run.plot and self.logs:
            summary["plot"] = str(self.directory / "loss.png")
            try:
                plot(self.metrics.path, self.directory / "loss.png")
            except (OSError, ValueError) as error:
                log.warning("no plot of the loss: %s", error)
        return summary

    def evaluate(self) -> float | None:
        """The mean loss over ``run.evaluate_samples`` held-out samples, in nats a token; None if there are none."""
        held_out = self.inputs.held_out
        if held_out is None:
            return None
        if self._evaluated is not None and self._evaluated[0] == self.step:
            return self._evaluated[1]
        batch = held_out.batch
        losses = [
            self.engine.evaluate(*data, batch=batch)
            for data in held_out.held_out(max(1, self.config.run.evaluate_samples // batch))
        ]
        loss = float(np.mean(losses))
        self._evaluated = self.step, loss
        if self.logs:
            self.metrics.write({"step": self.step - 1, "tokens": self.step * self.tokens, "held_out": loss})
            log.info("step %d/%d  held-out loss %.4f", self.step, self.config.train.steps, loss)
        return loss

    def save(self) -> Path:
        """Write a checkpoint of the step that is done; returns its folder."""
        start = time.perf_counter()
        state = {
            "hpcmp": __version__,
            "config": self.config.to_dict(),
            "optimizer_steps": self.engine.optimizer.steps,
            "loss_scale": self.engine.loss_scale.state(),
            "sampler": self.inputs.sampler.state_dict(),
            "layout": dataclasses.asdict(self.config.layout),
        }
        slabs = save_slabs(self.engine, self.inputs.tokenizer)
        c = self.config.checkpoint
        path = save(self.checkpoints, self.step, slabs, state, self.mesh, storage=c.storage, keep=c.keep)
        self._saved = self.step, path
        if self.logs:
            log.info(
                "step %d/%d  saved %s in %.1f s", self.step, self.config.train.steps, path, time.perf_counter() - start
            )
        return path

    def _save_if_possible(self) -> None:
        """Save on the way: what went before is kept, and a disk that is full now may not be so later."""
        try:
            self.save()
        except CheckpointSaveError as error:
            if self.logs:
                log.warning("%s; training goes on, %s", error, self._last())

    def _open_directory(self) -> None:
        if self.config.run.plot and find_spec("matplotlib") is None:
            raise InputError('run.plot needs matplotlib: pip install "hpcmp[plot]"')
        self.directory, checkpoints = Path(self.config.run.directory), self.config.checkpoint.directory
        self.checkpoints = Path(checkpoints or self.directory / "checkpoints")
        self.metrics = Metrics(self.directory)
        if not self.logs:
            return
        for key, folder in (("run.directory", self.directory), ("checkpoint.directory", self.checkpoints)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / ".hpcmp-writable").touch()
                (folder / ".hpcmp-writable").unlink()
            except OSError as error:
                raise InputError(f"{key}: cannot write in {folder}: {error.strerror}") from None

    def _resume(self) -> None:
        """Go on from the newest checkpoint that is whole; a damaged one is named and passed over."""
        found = self.mesh.gather_objects([str(path) for path in checkpoints(self.checkpoints)] if self.logs else None)[
            0
        ]
        for path, last in ((path, path == found[-1]) for path in found):
            try:
                checkpoint = open_checkpoint(Path(path), self.mesh)
                with self._agreed():
                    check_same_model(checkpoint, self.config)
                    self.inputs.sampler.load_state_dict(checkpoint.state["sampler"])
                checkpoint.load(load_slabs(self.engine))
                self.engine.buckets.publish()
            except CheckpointError as error:
                if last:
                    raise
                if self.logs:
                    log.warning("%s; trying the one before", error)
                continue
            self.engine.optimizer.steps = checkpoint.state["optimizer_steps"]
            if "loss_scale" in checkpoint.state:  # else written before there was one
                self.engine.loss_scale.load(checkpoint.state["loss_scale"])
            self.step = checkpoint.step
            self._saved = checkpoint.step, checkpoint.path
            if self.logs:
                log.info("resumed from %s (step %d)", checkpoint.path, self.step)
            return

    def _say_hello(self) -> None:
        if self.logs:
            c = self.config
            log.info(
                "%s: %s parameters, %d layers; %d ranks as %s; batch %d x %d tokens in %d microbatches",
                *(c.model.style, f"{self.engine.architecture.parameters:,}", c.model.layers, self.mesh.size),
                *(short(c.layout), c.train.batch, c.model.sequence, self.engine.microbatches()),
            )
            if self.mesh.size > 1:
                log.info("%s", self.mesh.describe())
            if advice := self.mesh.advice():
                log.warning("%s", advice)

    def _record(self, result: Result, seconds: float) -> None:
        if not self.logs:
            return
        per_second, share = self.progress.rates(1, seconds)
        routers = ("balance", "z", "dropped") if self.config.model.experts and not result.skipped else ()
        self.metrics.write(
            {
                "step": self.step - 1,
                "tokens": self.step * self.tokens,
                "loss": result.loss if math.isfinite(result.loss) else None,  # a skipped step's may be neither
                "norm": None if result.skipped else result.norm,
                "rate": result.rate,
                **{name: getattr(result, name) for name in routers},
                "seconds": seconds,
                "tokens_per_second": per_second,
                "share_of_peak": share,
            }
        )
        if result.skipped:
            scale = self.engine.loss_scale.scale
            log.info("step %d: the gradient overflows float16; skipped, the loss scale is %g now", self.step - 1, scale)
        self.progress.after(self.step, result.loss, result.norm)

    def _last(self) -> str:
        return f"the last checkpoint is {self._saved[1]}" if self._saved else "there is no checkpoint yet"

    def _agreed(self) -> Any:
        return agreed(self.mesh, lambda who, why: InputError(f"{who}{why}"))
