"""Going on after the loss of ranks (``train.recover``): the processes that are left train on from what was saved last.

A rank that dies, of whatever, makes the others' communication fail. They give up their trainer as it is, waiting for
nobody; agree that ranks are lost; and are given places anew: a rank that waited (``train.spares``) takes that of one
that is dead, and as long as there are too few, there are fewer replicas. A new trainer then resumes as at any start.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from ..checkpoint.owner import Owner, declare_dead, this_process
from ..comm.check import ranks_text
from ..errors import HpcmpError, InputError
from .config import Config
from .layout import short
from .records import Records
from .report import RECOVERIES
from .trainer import Trainer
from .watchdog import end_job

if TYPE_CHECKING:
    from mpi4py import MPI

    from ..comm.survive import Survivors

T = TypeVar("T")
log = logging.getLogger("hpcmp")

TRIES = 3  # times in a row that ranks may be lost without a new step between


class LostError(HpcmpError):
    """Ranks are lost, and those that are left cannot go on by themselves; another start of the job can."""

    exit_code = 69


class Recovery:
    """Trains as ``config`` says on the ranks of ``comm`` (None: this process alone), whatever becomes of some of them.

        recovery = Recovery(config, comm)
        summary = recovery.run(lambda trainer: trainer.train())

    Without ``train.recover`` it is a ``Trainer`` and no more. leads: whether this rank speaks for the run: rank 0 does,
    and when it is lost, another. lead: called on that one. lost: the ranks that were lost, each with its host.
    """

    def __init__(self, config: Config, comm: MPI.Intracomm | None, lead: Callable[[], None] = lambda: None) -> None:
        self.config, self.comm, self.lead = config, comm, lead
        self.leads = comm is None or comm.rank == 0
        self.lost: dict[int, str] = {}
        self._trainer: Trainer | None = None
        self._stop: tuple[str, bool] | None = None
        self._guard: threading.Timer | None = None
        self._began = time.monotonic()
        self._noticed: float | None = None  # when the loss was, in seconds since 1970
        self._untold: list[int] = []
        self._furthest = self._tries = 0

    def request_stop(self, reason: str = "asked to stop", requeue: bool = False) -> None:
        """Stop after the step at hand, or the first one after a recovery; see ``Trainer.request_stop``."""
        self._stop = reason, requeue
        if self._trainer is not None:
            self._trainer.request_stop(reason, requeue)

    def run(self, work: Callable[[Trainer], T]) -> T | None:
        """What ``work`` returns of the trainer that came to its end; None on a rank that only waited. Collective.

        Raises InputError where MPI goes on without no rank, LostError if too few are left or there is no progress.
        """
        if self.comm is None or self.comm.size == 1 or not self.config.train.recover:
            return self._train(self.config, self.comm, 0, work)
        from ..comm.survive import Survivors, free, missing

        if why := missing():
            raise InputError(f"train.recover: {why}")
        most = self.comm.size - self.config.train.spares
        if most < 1:
            raise InputError(f"train.spares = {self.config.train.spares}, and there are {self.comm.size} ranks in all")
        self.config.resolved(ranks=most)
        survivors = Survivors(self.comm)
        me, places = survivors.ranks[self.comm.rank], survivors.ranks
        owners = dict(zip(places, survivors.comm.allgather(this_process()), strict=True))
        hosts = {rank: owner.host for rank, owner in owners.items()}
        while True:
            config, count = self._plan(len(places), most)
            idle = me not in places[:count]
            result, well = None, True
            if idle:
                self.leads, self._tries, self._untold = False, 0, []  # of what comes now the others know more
                self._watch(False)
            else:
                result, well = self._attempt(config, survivors, places, count, work)
            if survivors.agree(well, idle=idle):
                return result
            self._watch(True)
            gc.collect()  # the old trainer, before there is a new one
            free()
            dead = survivors.shrink()
            self._bury(dead, owners)
            places = rearranged(places, count, config.layout.inner, dead, hosts)

    def _attempt(
        self, config: Config, survivors: Survivors, places: list[int], count: int, work: Callable[[Trainer], T]
    ) -> tuple[T | None, bool]:
        """What ``work`` returns, and whether it came to its end: not so if a rank was lost meanwhile."""
        from ..comm.survive import is_loss, revoke

        try:
            return self._train(config, survivors.group(places[:count]), len(places) - count, work), True
        except Exception as error:
            if not is_loss(error):
                raise
            self._noticed = self._noticed or time.time()
            self._watch(True)
            revoke()
        return None, False

    def _train(self, config: Config, comm: MPI.Intracomm | None, waiting: int, work: Callable[[Trainer], T]) -> T:
        try:
            with Trainer(config, comm, recovering=True) as trainer:
                self._trainer = trainer
                self._begin(trainer, waiting)
                return work(trainer)
        finally:
            if self._trainer is not None and self._trainer.step > self._furthest:
                self._furthest, self._tries = self._trainer.step, 0
            self._trainer = None

    def _begin(self, trainer: Trainer, waiting: int) -> None:
        """The trainer is about to step."""
        self._watch(False)
        self.leads = trainer.logs
        if self._stop is not None:
            trainer.request_stop(*self._stop)
        if not self._tries:
            return
        known = trainer.mesh.gather_objects((self._furthest, self._tries, self._noticed, self._untold))
        self._furthest, self._tries = max(each[0] for each in known), max(each[1] for each in known)
        self._untold = sorted({rank for each in known for rank in each[3]})
        noticed = min((each[2] for each in known if each[2] is not None), default=time.time())
        if self.leads:
            self.lead()
            self._tell(trainer, waiting, time.time() - noticed)
        self._untold, self._noticed = [], None

    def _tell(self, trainer: Trainer, waiting: int, seconds: float) -> None:
        """What was lost, and how it goes on: a line of the log, and a record in the run's directory."""
        layout, ranks, step = short(trainer.config.layout), trainer.mesh.size, trainer.step
        again = max(0, self._furthest - step)
        log.warning(
            "%s lost; %d ranks go on as %s after step %d (%d taken again, %d ranks waiting), %.1f s later",
            *(self._who(), ranks, layout, step, again, waiting, seconds),
        )
        lost = {rank: self.lost[rank] for rank in self._untold}
        record = {"time": time.time(), "lost": lost, "ranks": ranks, "waiting": waiting, "layout": layout}
        Records(trainer.directory / RECOVERIES).write(record | {"step": step, "again": again, "seconds": seconds})

    def _plan(self, left: int, most: int) -> tuple[Config, int]:
        """The configuration on ``left`` ranks, and how many of them it takes: ``most``, or the most replicas there can
        be. Raises LostError if there can be none, or there is no progress."""
        if self._tries > TRIES:
            raise LostError(f"{self._who()} lost, the {self._tries}th time without a step between: the run ends")
        config = self.config
        if config.train.minutes is not None:
            minutes = max(1e-3, config.train.minutes - (time.monotonic() - self._began) / 60)
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, minutes=minutes))
        if left >= most:
            return config, most
        fewer: Any = None  # what is left of the ranks
        config = dataclasses.replace(config, layout=dataclasses.replace(config.layout, dp=fewer))
        inner = config.layout.inner
        for ranks in range(left // inner * inner, 0, -inner):
            with suppress(InputError):
                config.resolved(ranks=ranks)
                return config, ranks
        layout = short(config.layout.resolved())
        raise LostError(f"{self._who()} lost: {layout} does not fit the {left} ranks that are left")

    def _bury(self, dead: list[int], owners: Mapping[int, Owner]) -> None:
        """Know of the end of some ranks: what they had locked is free."""
        self._tries += 1
        for rank in dead:
            declare_dead(owners[rank])
            self.lost[rank] = owners[rank].host
        self._untold = sorted([*self._untold, *dead])

    def _who(self) -> str:
        if not self._untold:
            return "a connection is"
        hosts = ", ".join(dict.fromkeys(self.lost[rank] for rank in self._untold))
        return f"{ranks_text(self._untold)} on {hosts} {'is' if len(self._untold) == 1 else 'are'}"

    def _watch(self, on: bool) -> None:
        """Between two trainers no watchdog would end a job that hangs: let a timer do it meanwhile."""
        if on and self._guard is None and self.config.train.watchdog:
            why = f"ranks were lost, and {self.config.train.watchdog:g} s later the others have not begun again"
            self._guard = threading.Timer(self.config.train.watchdog, end_job, [why])
            self._guard.daemon = True
            self._guard.start()
        elif not on and self._guard is not None:
            self._guard.cancel()
            self._guard = None


def rearranged(
    places: Sequence[int], count: int, inner: int, dead: Collection[int], hosts: Mapping[int, str]
) -> list[int]:
    """The ranks that are left, in new places. Before, the first ``count`` of ``places`` worked, in replicas of
    ``inner``, and the others waited.

    A rank that waited, if possible on the same host, takes the place of each that is dead. If there are too few,
    replicas that are whole come first, and the rest of those that are not waits.
    """
    waiting = [rank for rank in places[count:] if rank not in dead]
    filled: list[int | None] = []
    for rank in places[:count]:
        if rank not in dead:
            filled.append(rank)
        elif waiting:
            near = [each for each in waiting if hosts[each] == hosts[rank]]
            filled.append(waiting.pop(waiting.index(near[0]) if near else 0))
        else:
            filled.append(None)
    replicas = [filled[at : at + inner] for at in range(0, count, inner)]
    replicas.sort(key=lambda replica: None in replica)
    return [rank for replica in replicas for rank in replica if rank is not None] + waiting
