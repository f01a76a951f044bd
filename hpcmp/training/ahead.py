"""Ahead: the steps of a run in order, of which the next may be queued before the result of the last one is known."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from ..data.loader import Batch, Batches
from .config import Config
from .engine import Engine
from .outcome import Result, Running


@dataclass
class _Begun:
    """A step that has been begun, and with what; ``running`` is None where it is to be begun again."""

    number: int
    batch: Batch
    stop: bool
    tell: bool
    running: Running | None = None


class Ahead:
    """Steps of ``engine`` on ``batches``. All methods are collective.

        ahead.begin(0)
        ahead.begin(1)                      # while step 0 still runs on the device
        result, seconds = ahead.result()    # of step 0

    What was begun after a step that turns out no good has changed nothing. It is begun again, on the same batch, before
    anything else is begun or its result is given: what is to be done about the bad step is done first.
    """

    def __init__(self, engine: Engine, batches: Batches) -> None:
        self.engine, self.batches = engine, batches
        self._begun: deque[_Begun] = deque()
        self._since = 0.0

    def __len__(self) -> int:
        """How many steps are under way."""
        return len(self._begun)

    def begin(self, number: int, *, stop: bool = False, tell: bool = False) -> None:
        """Queue step ``number`` on the next batch; see ``Engine.begin``."""
        if not self._begun:
            self._since = time.perf_counter()
        with self.engine.phases("data"):
            batch = self.batches.next()
        self._begun.append(_Begun(number, batch, stop, tell))
        self._queue()

    def result(self) -> tuple[Result, float]:
        """The result of the oldest step under way, and the seconds that it took: since the result before it, or since
        it was begun if that was later."""
        self._queue()
        first = self._begun.popleft()
        assert first.running is not None
        result = first.running.result()
        if not result.sound:
            for each in self._begun:
                each.running = None
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return result, seconds

    def _queue(self) -> None:
        for each in self._begun:
            if each.running is None:
                each.running = self.engine.begin(each.number, *each.batch, stop=each.stop, tell=each.tell)


def pauses(config: Config, step: int) -> bool:
    """Whether something is to be done after ``step`` steps, before the next one may change the weights."""
    c = config
    every = c.train.steps, c.train.replica_check, c.run.evaluate_every, c.checkpoint.every, c.checkpoint.local_every
    return any(n and step % n == 0 for n in every)
