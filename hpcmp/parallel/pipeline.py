"""The runner: executes any schedule's actions on one stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import Array
from ..comm.base import Communicator, Pending
from ..cursor import Cursor, Place
from ..module import Module
from ..wgrad import Done, Now, Queue, now
from .schedules import Schedule, forward_only

_FORWARD, _BACKWARD = 0, 1  # tags: 2 * microbatch + direction


@dataclass
class Microbatch:
    """Some samples: ``inputs`` and ``targets`` (S, batch) integers, and their place in the run.

    Only the first stage needs inputs and only the last targets; elsewhere they may be None.
    """

    inputs: Array | None
    targets: Array | None
    place: Place


class Pipeline:
    """Runs one stage of a model over microbatches: the stages of the group ``pp``, in rank order.

    ``loss`` maps (output, targets) to a sum over positions. ``shape`` gives the shape of the activation that enters
    (and leaves) this stage for a place, ``like`` an array of its kind and dtype. The cursor is moved before each
    action.
    """

    def __init__(
        self,
        stage: Module,
        loss: Module,
        pp: Communicator,
        schedule: Schedule,
        cursor: Cursor,
        shape: Callable[[Place], tuple[int, ...]],
        like: Array,
    ) -> None:
        self.stage, self.loss, self.pp, self.schedule = stage, loss, pp, schedule
        self.cursor, self.shape, self.like = cursor, shape, like
        self.first, self.last = pp.rank == 0, pp.rank == pp.size - 1

    def step(self, microbatches: Sequence[Microbatch], scale: float, done: Done = lambda module: None) -> Array:
        """Add the gradient of ``scale`` times the summed loss over all microbatches; return the sum of the losses.

        The sum is an array of the stage's kind, on the last stage; zero elsewhere. ``done(module)`` is called whenever
        a module's weight gradients are complete for the step, so that their reduction can start under what is left.
        """
        actions = list(self.schedule(self.pp.rank, self.pp.size, len(microbatches)))
        weights = "W" if any(action.kind == "W" for action in actions) else "B"
        final = max((i for i, action in enumerate(actions) if action.kind == weights), default=-1)
        split = weights == "W"
        total = self.like.dtype.type(0).astype(np.float64)
        saved: dict[int, Any] = {}
        sends: list[Pending] = []
        for step, (kind, i) in enumerate(actions):
            batch = microbatches[i]
            self.cursor.place = batch.place
            if kind == "F":
                x = batch.inputs if self.first else self._receive(batch, self.pp.rank - 1, 2 * i + _FORWARD)
                y, kept = self.stage.forward(x)
                if self.last:
                    y, from_loss = self.loss.forward((y, batch.targets))
                    total = total + y
                    kept = (kept, from_loss)
                else:
                    sends.append(self.pp.send(y, self.pp.rank + 1, 2 * i + _FORWARD))
                if final >= 0:  # else nothing comes back for it
                    saved[i] = kept
            elif kind == "B":
                kept = saved.pop(i)
                if self.last:
                    kept, from_loss = kept
                    dy = self.loss.backward(scale, from_loss, now)[0]
                    del from_loss
                else:
                    dy = self._receive(batch, self.pp.rank + 1, 2 * i + _BACKWARD)
                wgrad: Any = Queue() if split else Now(done) if step == final else now
                dx = self.stage.backward(dy, kept, wgrad)
                del kept, dy
                if not self.first:
                    sends.append(self.pp.send(dx, self.pp.rank - 1, 2 * i + _BACKWARD))
                if split:
                    saved[i] = wgrad
            else:
                saved.pop(i).flush(Now(done) if step == final else now)
            sends = [send for send in sends if not send.test()]
        for send in sends:
            send.wait()
        return total

    def evaluate(self, microbatches: Sequence[Microbatch]) -> Array:
        """The sum of the losses, on the last stage; zero elsewhere. No gradient."""
        whole, self.schedule = self.schedule, forward_only
        try:
            return self.step(microbatches, 0.0)
        finally:
            self.schedule = whole

    def _receive(self, batch: Microbatch, peer: int, tag: int) -> Array:
        return self.pp.recv(self.shape(batch.place), self.like.dtype, peer, tag, like=self.like).wait()
