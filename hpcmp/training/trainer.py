"""Trainer: a configuration, a communicator, and the run from its newest checkpoint to its end."""

from __future__ import annotations

import dataclasses
import math
import secrets
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..checkpoint import checkpoints, tier
from ..checkpoint.agree import agreed
from ..errors import HpcmpError, InputError
from .ahead import Ahead, pauses
from .alike import check_alike, check_data
from .config import Config
from .directories import Directories
from .engine import Engine, Result, mesh_for
from .held_out import HeldOut
from .inputs import Inputs
from .limits import Limits
from .manifest import begin, end
from .measure import measured_before
from .metrics import Metrics, greet
from .nonfinite import Patience
from .plots import plotted
from .profile import Profile
from .ranklogs import RankLog
from .replicas import ReplicaError, check_replicas
from .saving import Saving
from .state import load_initial
from .stopping import Stop
from .telling import Telling
from .watchdog import failed, watch

if TYPE_CHECKING:
    from mpi4py import MPI


class Trainer:
    """Trains as ``config`` says on the ranks of ``comm`` (None: this process alone), which is duplicated, not used.

        with Trainer(config, comm) as trainer:
            for result in trainer:          # one optimizer step each, to train.steps
                ...

    On entry the run goes on from the newest checkpoint, whatever layout wrote it. Steps, samples and random numbers are
    those of the serial run on every layout; on the same layout a continued run equals the uninterrupted one bit for
    bit. All methods are collective. Raises InputError, the same on every rank, for what the user can mend.

    recovering: it is a ``Recovery`` that makes it, without which ``train.recover`` is refused.
    """

    def __init__(self, config: Config, comm: MPI.Intracomm | None = None, *, recovering: bool = False) -> None:
        self.recovering = recovering
        self._opened = ExitStack()  # what this rank lets go of by itself, however the run ends
        try:
            self._open(config, comm)
            self._build()
        except BaseException:
            self._opened.__exit__(*sys.exc_info())
            raise

    def _open(self, config: Config, comm: MPI.Intracomm | None) -> None:
        """The ranks, the data, the directories, and who watches over them."""
        check_alike(config, comm)
        self.config = config.resolved(ranks=1 if comm is None else comm.size)
        self.mesh = mesh_for(self.config, comm)
        with agreed(self.mesh, lambda who, why: InputError(f"{who}{why}")):
            self.inputs = Inputs(self.config, self.mesh)
            self._opened.callback(self.inputs.close)
            self.config = self.inputs.config
            self._check()
        check_data(self.inputs, self.mesh)
        self.directories = Directories(self.config, self.mesh)
        self._opened.callback(self.directories.close)
        self.directory, self.checkpoints = self.directories.run, self.directories.checkpoints
        self.metrics = Metrics(self.directory, self.config.run.tensorboard)
        if self.config.run.rank_logs:
            self._opened.callback(RankLog(self.directory, self.mesh.rank).close)
        train = self.config.train
        self.watchdog = watch(self.directory, self.mesh, train.watchdog, recovers=train.recover)
        if self.watchdog is not None:
            self._opened.callback(self.watchdog.stop)
        self._opened.push(self._failed)

    def _build(self) -> None:
        """All of the run, as it is after its newest checkpoint."""
        train = self.config.train
        begun = checkpoints(self.checkpoints) or (self.checkpoints / tier.NAME).exists()
        again = self.config.checkpoint.resume and begun
        self.config = measured_before(self.config, self.mesh, self.directory / "config.toml" if again else None)
        self.engine = Engine(self.config, self.mesh)
        self.config = self.engine.config
        self.step = 0
        self.stop = Stop()
        self.saving = Saving(self.engine, self.inputs, self.config, self.checkpoints, self.metrics)
        self._opened.callback(self.saving.abandon)
        self.held_out = HeldOut(self.engine, self.inputs.held_out, self.metrics)
        self.run = self.mesh.gather_objects(secrets.token_hex(8))[0]
        self.saving.facts = self._facts
        resumed = self.saving.resume() if self.config.checkpoint.resume else None
        if resumed is not None:
            self.step = resumed.step
            if isinstance(run := resumed.state.get("run"), str):
                self.run = run
        elif self.config.checkpoint.initial:
            load_initial(self.config.checkpoint.initial, self.engine, self.inputs.tokenizer)
        self.limits = Limits(self.config, self.saving, self.directory, self.step)
        begin(self.config, self.mesh, self.inputs, self.directory, self.run, self.step)
        self.telling = Telling(self.engine, self.metrics, self.step)
        self.patience = Patience(train.nan, train.nan_limit)
        self.ahead = Ahead(self.engine, self.inputs.train)
        self._results: deque[Result] = deque()  # of steps that are done, to be given
        self._ending, self._alone = False, range(0)  # _alone: steps that are begun when the one before is done

    @property
    def logs(self) -> bool:
        """Whether this rank speaks for the run."""
        return self.mesh.rank == 0

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *exc: Any) -> None:
        if exc[1] is not None:
            self._opened.__exit__(*exc)
            return
        with self._opened:
            self.saving.finish()
        self.mesh.close()  # collective: after an error the other ranks may not come

    def _failed(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """The run ends, by ``error`` unless it is None or Recovery goes on after it."""
        if self.config.train.recover and error is not None and self.mesh.comm is not None:
            from ..comm.survive import is_loss

            if is_loss(error):
                return
        failed(error, self.directory, self.mesh, self.watchdog)

    def request_stop(self, reason: str = "asked to stop", requeue: bool = False) -> None:
        """Stop after the step at hand, with a checkpoint: all ranks agree. Safe in a signal handler.

        requeue: with ``train.requeue`` the job is to be run again, unless somebody else asked to stop for good.
        """
        self.stop.ask(reason, requeue)

    def __iter__(self) -> Iterator[Result]:
        """Step to ``train.steps``, or until a stop is asked for; evaluate and save on the way as configured.

        With ``train.ahead`` the step after the one whose result is given may be under way: ``engine`` may be a step
        further than ``step`` says. ``save`` and ``evaluate`` wait for it, and are of the step that it was.
        """
        c, phases = self.config, self.engine.phases
        while self._results or self.step < c.train.steps:
            if not self._results:
                self._take()
            result = self._results.popleft()
            with phases("checkpoint"):
                self.saving.poll()
                if c.train.replica_check and self.step % c.train.replica_check == 0:
                    self._check_replicas()
            if c.run.evaluate_every and self.step % c.run.evaluate_every == 0:
                self.evaluate()
            with phases("checkpoint"):
                if c.checkpoint.every and self.step % c.checkpoint.every == 0:
                    self._save_if_possible()
                elif c.checkpoint.local_every and self.step % c.checkpoint.local_every == 0:
                    self.saving.local(self.step)
            yield result
            if self._ending and not (len(self.ahead) or self._results):
                self.stop.agree(self.mesh)
                break
        self.saving.finish()

    def _take(self) -> None:
        """Take step ``self.step``; with ``train.ahead`` begin the next before that is there, if nothing is to come
        between."""
        if not len(self.ahead):
            self._begin(self.step)
        following = self.step + 1
        if self.config.train.ahead:
            self._ending = self.stop.asked_anywhere(self.mesh)
            if not (self._ending or following in self._alone or pauses(self.config, following)):
                self._begin(following)
        self._complete()

    def _begin(self, step: int) -> None:
        """Begin step ``step``."""
        if reason := self.limits.over(step):
            self.request_stop(reason, requeue=True)
        if self.directories.lost:
            self.request_stop(self.directories.lost)
        self.ahead.begin(step, stop=self.stop.asked, tell=self.telling.due(step + 1))

    def _complete(self) -> None:
        """Wait for the oldest step under way, and tell of it."""
        result, seconds = self.ahead.result()
        if error := self.patience.after(self.step, result):
            self._end(error)
        self.step += 1
        self._ending = self._ending or result.stop
        self.telling.after(self.step, result, seconds)
        self._results.append(dataclasses.replace(result, stop=self._ending))

    def _settle(self) -> None:
        """Have no step under way."""
        while len(self.ahead):
            self._complete()

    def _check_replicas(self) -> None:
        try:
            check_replicas(self.engine, self.step)
        except ReplicaError as error:
            self._end(error)

    def _end(self, error: HpcmpError) -> NoReturn:
        """End the run with ``error``, once the save behind the steps is committed: it holds a step before."""
        self.saving.finish()
        raise HpcmpError(f"{error}; {self.saving.last_known()}") from None

    def train(self, profile: int = 0) -> dict[str, Any]:
        """Run to the end, save, evaluate, and return the summary; take a profile of ``profile`` steps."""
        if self.logs:
            greet(self.engine)
        loss, first = math.nan, self.step
        profiled = Profile(self.engine, self.directory, profile, self.step, self.config.train.steps)
        self._alone = profiled.alone
        for result in profiled.over(self):
            loss = result.loss
        finished = self.step >= self.config.train.steps
        held_out = self.evaluate() if finished else None  # one that has to end has no time for it
        if self.saving.last is None or self.saving.last[0] != self.step:
            self.save()
        self.saving.forget_local()
        again = self.limits.again(self.step, wanted=not (finished or self.stop.final))
        seconds = time.perf_counter() - self.telling.progress.began
        per_second, share = self.telling.progress.rates(self.step - first, seconds)
        summary = {
            "step": self.step,
            "steps": self.config.train.steps,
            "finished": finished,
            "reason": "finished" if finished else self.stop.reason,
            "requeue": again.command,
            "stuck": again.stuck,
            "loss": loss if math.isfinite(loss) else None,
            "held_out_loss": held_out,
            "seconds": seconds,
            "tokens_per_second": per_second,
            "share_of_peak": share,
            "parameters": self.engine.architecture.parameters,
            "layout": dataclasses.asdict(self.config.layout),
            "checkpoint": str(self.saving.last[1]) if self.saving.last else None,
            "metrics": str(self.metrics.path),
            "profile": profiled.summary,
        }
        end(summary, self.mesh, self.directory)
        if self.config.run.plot and self.logs:
            summary["plot"] = plotted(self.directory)
        return summary

    def evaluate(self) -> float | None:
        """The mean loss over ``run.evaluate_samples`` held-out samples, in nats a token; None if there are none."""
        self._settle()
        return self.held_out.loss(self.step)

    def save(self) -> Path:
        """Write a checkpoint of the step that is done, and return its folder when it is committed."""
        self._settle()
        return self.saving.now(self.step)

    def _facts(self, rated: bool) -> dict[str, Any]:
        """What a checkpoint of this step says besides: which run it is of, and how good it is where that is known;
        ``rated``: where it decides what is kept, too. Nothing is saved of replicas that differ."""
        if self.config.train.replica_check:
            self._check_replicas()
        if rated and self.config.checkpoint.keep_best:
            self.evaluate()
        return {"run": self.run, "held_out_loss": self.held_out.known(self.step)}

    def _save_if_possible(self) -> None:
        with self.saving.going_on():
            if self.saving.behind:
                self.saving.begin(self.step)
            else:
                self.save()

    def _check(self) -> None:
        """Raise InputError for what would only be found at the end, or at the first checkpoint."""
        if self.config.train.recover and not self.recovering:
            raise InputError("train.recover: a program of its own needs hpcmp.Recovery in place of hpcmp.Trainer")
        if self.config.run.plot and find_spec("matplotlib") is None:
            raise InputError('run.plot needs matplotlib: pip install "hpcmp[plot]"')
