"""Trainer: a configuration, a communicator, and the run from its newest checkpoint to its end."""

from __future__ import annotations

import dataclasses
import logging
import math
import secrets
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoint import checkpoints, open_checkpoint, tier
from ..checkpoint.agree import agreed
from ..errors import CheckpointError, HpcmpError, InputError
from .config import Config
from .directories import Directories
from .engine import Engine, Result, mesh_for
from .inputs import Inputs
from .layout import short
from .measure import measured_before
from .metrics import Metrics, Progress, peak_flops, plot
from .saving import Saving
from .state import begin_anew, check_same_model, load_initial, resume

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
        self.mesh = mesh_for(self.config, comm)
        with self._agreed():
            self.inputs = Inputs(self.config, self.mesh)
            self.config = self.config.resolved(vocabulary=self.inputs.vocabulary)
            self._check()
        self.directories = Directories(self.config, self.mesh)
        self.directory, self.checkpoints = self.directories.run, self.directories.checkpoints
        self.metrics = Metrics(self.directory)
        try:
            self._build()
        except BaseException:
            self.directories.close()
            raise

    def _build(self) -> None:
        """All of the run, as it is after its newest checkpoint."""
        train = self.config.train
        begun = checkpoints(self.checkpoints) or (self.checkpoints / tier.NAME).exists()
        again = self.config.checkpoint.resume and begun
        self.config = measured_before(self.config, self.mesh, self.directory / "config.toml" if again else None)
        self.engine = Engine(self.config, self.mesh)
        self.config = self.engine.config
        if self.logs:
            (self.directory / "config.toml").write_text(self.config.to_toml(), encoding="utf-8")
        self.step = 0
        self.reason = "finished"
        self._stop = False
        self._began = time.perf_counter()
        self.saving = Saving(self.engine, self.inputs, self.config, self.checkpoints, self.metrics)
        self._evaluated: tuple[int, float] | None = None
        self.run = self.mesh.gather_objects(secrets.token_hex(8))[0]
        self.saving.facts = self._facts
        resumed = self.config.checkpoint.resume and self._resume()
        if not resumed and self.config.checkpoint.initial:
            load_initial(self.config.checkpoint.initial, self.engine, self.inputs.tokenizer)
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
        try:
            if exc[0] is None:
                self.saving.finish()
            else:
                self.saving.abandon()
        finally:
            self.inputs.close()
            self.directories.close()
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
            if self.directories.lost:
                self.request_stop(self.directories.lost)
            start = time.perf_counter()
            result = self.engine.step(self.step, *self.inputs.train.next(), stop=self._stop)
            if not math.isfinite(result.norm) and not result.skipped:
                self.saving.finish()
                told = f"loss {result.loss}, gradient norm {result.norm}"
                raise HpcmpError(f"step {self.step}: {told}; {self.saving.last_known()}")
            self.step += 1
            self._record(result, time.perf_counter() - start)
            self.saving.poll()
            if c.run.evaluate_every and self.step % c.run.evaluate_every == 0:
                self.evaluate()
            if c.checkpoint.every and self.step % c.checkpoint.every == 0:
                self._save_if_possible()
            elif c.checkpoint.local_every and self.step % c.checkpoint.local_every == 0:
                self.saving.local(self.step)
            yield result
            if result.stop:
                self.reason = self._why()
                break
        self.saving.finish()

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
        if self.saving.last is None or self.saving.last[0] != self.step:
            self.save()
        self.saving.forget_local()
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
            "checkpoint": str(self.saving.last[1]) if self.saving.last else None,
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
        """Write a checkpoint of the step that is done, and return its folder when it is committed."""
        return self.saving.now(self.step)

    def _facts(self, rated: bool) -> dict[str, Any]:
        """What a checkpoint of this step says besides: which run it is of, and how good it is where that is known;
        ``rated``: where it decides what is kept, too."""
        if rated and self.config.checkpoint.keep_best:
            self.evaluate()
        known = self._evaluated is not None and self._evaluated[0] == self.step
        return {"run": self.run, "held_out_loss": self._evaluated[1] if self._evaluated and known else None}

    def _save_if_possible(self) -> None:
        with self.saving.going_on():
            if self.saving.behind:
                self.saving.begin(self.step)
            else:
                self.save()

    def _check(self) -> None:
        """Raise InputError for what would only be found at the end, or at the first checkpoint."""
        if self.config.run.plot and find_spec("matplotlib") is None:
            raise InputError('run.plot needs matplotlib: pip install "hpcmp[plot]"')
        if self.config.checkpoint.keep_best and self.inputs.held_out is None:
            raise InputError("checkpoint.keep_best: data.path holds out less than a sample of model.sequence tokens")

    def _resume(self) -> bool:
        """Go on from the newest checkpoint that is whole, if there is any; a damaged one is named and passed over."""
        sources = self.saving.sources()
        for source in sources:
            try:
                checkpoint = open_checkpoint(source, self.mesh) if isinstance(source, Path) else source
                with self._agreed():
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
            if isinstance(run := checkpoint.state.get("run"), str):
                self.run = run
            self.step = checkpoint.step
            self.saving.resumed(checkpoint)
            if self.logs:
                log.info("resumed from %s (step %d)", checkpoint.path, self.step)
            return True
        if sources:  # they were all local, which ends no run
            self.inputs.sampler.samples = 0
            begin_anew(self.engine)
        return False

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

    def _agreed(self) -> Any:
        return agreed(self.mesh, lambda who, why: InputError(f"{who}{why}"))
