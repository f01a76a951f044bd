"""How long a run may go on, by its job's time limit and ``train.minutes``, and whether its job is run again."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import NamedTuple

from ..batch import RESUBMIT, find_job, requeue_command, time_left
from ..checkpoint.agree import broadcast
from .config import Config
from .metrics import clock
from .records import Records, read_records
from .saving import Saving

log = logging.getLogger("hpcmp")

NAME = "requeues.jsonl"
_RATE = 100e6  # bytes a second that a rank writes at least, until a save has been measured
BYTES = 12  # a checkpoint's of a parameter: its float32 weight and two moments


class Again(NamedTuple):
    """Whether the job is to be run again: the command for it, if it is, and whether it is not for want of progress."""

    command: list[str] | None = None
    stuck: bool = False


class Limits:
    """The time that a run has, which rank 0 keeps; it began after ``began`` steps, and writes in ``folder``.

    The scheduler is asked once, at the start. What the end takes is measured: the longest step, with what comes between
    steps, and the longest save; until there was one in this run's metrics, its bytes at 100 MB/s a rank.
    """

    def __init__(self, config: Config, saving: Saving, folder: Path, began: int) -> None:
        self.config, self.saving, self.began, self.mesh = config, saving, began, saving.engine.mesh
        self.records = Records(folder / NAME)
        self.job = find_job()
        self.command = requeue_command(self.job) if config.train.requeue else None
        self._start = time.monotonic()
        self._end: float | None = None  # by the scheduler
        self._first_save = 0.0
        self._turn: float | None = None  # when the step before this one began
        self._held, self._turns, self._step = 0.0, 0, 0.0
        self._ahead = config.train.ahead
        if self.mesh.rank != 0:
            return
        if config.train.requeue and self.command is None:
            log.warning("train.requeue: %s, and %s is not set: a run that stops ends with code 75", self.job, RESUBMIT)
        left = time_left(self.job)
        if left is not None:
            self._end = self._start + left
            self._first_save = _saves_before(saving.metrics.path) or _unmeasured(saving)
            log.info("%s: %s left", self.job, clock(left))
            if config.train.margin > left / 2:
                log.warning(
                    "train.margin = %g s is more than half of the %.0f s that %s job %s has left: the run stops to "
                    "save after few steps, if not the first; give train.margin fewer seconds, or the job more",
                    *(config.train.margin, left, self.job.scheduler, self.job.id),
                )

    def over(self, step: int) -> str:
        """Before step ``step``, on every rank: why it has to be the last one; "" if it has not, and on ranks but 0."""
        if self.mesh.rank != 0:
            return ""
        now = time.monotonic()
        if self._turn is not None:
            self._turns += 1
            took = now - self._turn - (self.saving.held - self._held)
            first = self._turns <= 2 + self._ahead  # which compiles
            self._step = took if first else max(self._step, took)
        self._turn, self._held = now, self.saving.held
        minutes = self.config.train.minutes
        if minutes is not None and now - self._start > 60 * minutes:
            return f"train.minutes = {minutes:g} are over"
        if self._end is None or now + self.needed(step) < self._end:
            return ""
        return (
            f"{max(0.0, self._end - now):.0f} s are left to {self.job.scheduler} job {self.job.id}: "
            f"a step takes {self._step:.1f} s, a save {self.save_seconds:.1f} s"
        )

    @property
    def save_seconds(self) -> float:
        """What a save takes."""
        return self.saving.slowest or self._first_save

    def needed(self, step: int) -> float:
        """The seconds that it takes if step ``step`` is not the last one: it, the one after it, and the end of
        the run; with ``train.ahead`` what is left of the one before, too.
        Saves before the last one count: one that runs behind the steps, and one that is due between the two."""
        every = self.config.checkpoint.every
        saves = 1 + (self.saving.saver.running is not None) + (every is not None and (step + 1) % every == 0)
        steps = 2 + self._ahead  # with ``train.ahead`` the step before this one may still be under way
        return self.config.train.margin + steps * self._step + saves * self.save_seconds

    def again(self, step: int, wanted: bool) -> Again:
        """What is to follow the end of the run after ``step`` steps, its last checkpoint being saved; collective.

        Not ``wanted``, or without ``train.requeue``: nothing. Each decision is recorded. A job that would be requeued a
        third time from one and the same step is not: it makes no progress.
        """
        again = Again()
        if wanted and self.command and self.mesh.rank == 0:
            again = self._decide(step, self.command)
        return Again(*broadcast(self.mesh, tuple(again)))

    def _decide(self, step: int, command: list[str]) -> Again:
        path = self.records.path
        try:
            before = read_records(path)[0] if path.exists() else []
        except OSError as error:
            log.warning("%s: %s: the job is not requeued", path, error.strerror or error)
            return Again()
        stuck = [(r.get("began"), r.get("requeued")) for r in before[-2:]] == [(self.began, True)] * 2
        record = {"time": time.time(), "job": self.job.id, "began": self.began, "ended": step, "requeued": not stuck}
        self.records.write(record)
        if self.records.failed:
            log.warning("the job is not requeued, since %s cannot say whether there is progress", path)
            return Again()
        if stuck:
            log.error(
                "three times the run has begun after step %d, and was to be requeued: it makes no progress, and is not "
                "requeued again (see %s, and whether checkpoint.resume is on and checkpoint.directory is kept)",
                *(self.began, path),
            )
        return Again(None, True) if stuck else Again(command)


def _unmeasured(saving: Saving) -> float:
    """The seconds of a save of which nothing is known but its size."""
    return BYTES * saving.engine.architecture.parameters / saving.engine.mesh.size / _RATE


def _saves_before(path: Path) -> float:
    """The longest of the last saves that the run's metrics tell of, in seconds; 0 if there is none."""
    try:
        seconds = [r["save_seconds"] for r in read_records(path)[0] if isinstance(r.get("save_seconds"), float)]
    except OSError:
        return 0.0
    return max(seconds[-5:], default=0.0)
