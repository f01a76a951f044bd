"""The runner: executes any schedule's actions on the virtual stages that a rank holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from ..comm.base import Communicator
from ..cursor import Cursor, Place
from ..module import Module
from ..wgrad import Now, Queue, Sink, WGrad, now
from .messages import Messages
from .schedules import Action, Schedule


@dataclass
class Microbatch:
    """Some samples: ``inputs`` and ``targets`` (S, batch) integers, and their place in the run.

    Only the rank of the first virtual stage needs inputs and only that of the last targets; elsewhere they may be None.
    """

    inputs: Array | None
    targets: Array | None
    place: Place


class Executed(NamedTuple):
    """An action and when it ran, without the wait for its input: seconds of ``time.perf_counter``."""

    action: Action
    start: float
    end: float


#: Executes an action on what comes in; returns what goes out.
Run = Callable[[Action, Array | None, WGrad], Array | None]


class Pipeline:
    """Runs the virtual stages of a rank over microbatches, in the order of a schedule, over the group ``pp``.

    ``stages[c]`` is chunk c. ``loss`` maps (output, targets) to a sum over positions. ``shape`` gives the shape of an
    activation between stages for a place, to which the cursor has been moved; ``like`` is an array of its kind and
    dtype. The cursor is moved before each action. ``trace``, if it is a list, is appended to: what ran, and when.
    ``around``, if it is there, makes of the function that executes an action the one that is called in its place.
    """

    def __init__(
        self,
        stages: Sequence[Module],
        loss: Module,
        pp: Communicator,
        schedule: Schedule,
        cursor: Cursor,
        shape: Callable[[Place], tuple[int, ...]],
        like: Array,
    ) -> None:
        self.stages, self.loss, self.pp, self.schedule = list(stages), loss, pp, schedule
        self.cursor, self.shape, self.like = cursor, shape, like
        held = [schedule.stage(pp.rank, pp.size, chunk) for chunk in range(schedule.chunks)]
        self.first, self.last = 0 in held, schedule.stages(pp.size) - 1 in held
        self.trace: list[Executed] | None = None
        self.around: Callable[[Run], Run] | None = None

    def step(self, microbatches: Sequence[Microbatch], scale: float, sink: Sink | None = None) -> Array:
        """Add the gradient of ``scale`` times the summed loss over all microbatches; return the sum of the losses.

        The sum is an array of the stages' kind, on the rank of the last stage; zero elsewhere. ``sink`` is told of
        every weight gradient; one is final in its chunk's last action that computes any, so that its reduction can
        start under what is left.
        """
        actions = list(self.schedule(self.pp.rank, self.pp.size, len(microbatches)))
        step = _Step(self, microbatches, scale, {action.kind for action in actions})
        final = {action.chunk: action for action in actions if action.kind == ("W" if step.split else "B")}
        messages = Messages(self.pp, self.schedule, self.like)
        run = step.run if self.around is None else self.around(step.run)
        for at, action in enumerate(actions):
            for coming in actions[at : at + 2]:  # a message for the next action arrives under this one
                self.cursor.place = place = microbatches[coming.microbatch].place
                messages.expect(coming, self.shape, place)
            self.cursor.place = microbatches[action.microbatch].place
            entering = messages.take(action)
            start = perf_counter()
            wgrad = now if sink is None else Now(sink, action == final.get(action.chunk))
            leaving = run(action, entering, wgrad)
            if self.trace is not None:
                self.trace.append(Executed(action, start, perf_counter()))
            messages.give(action, leaving)
            del entering, leaving
        messages.finish()
        return step.total

    def evaluate(self, microbatches: Sequence[Microbatch]) -> Array:
        """The sum of the losses, on the rank of the last stage; zero elsewhere. No gradient."""
        whole, self.schedule = self.schedule, self.schedule.forward_only()
        try:
            return self.step(microbatches, 0.0)
        finally:
            self.schedule = whole


class _Step:
    """What lives from one action to another: what the stages saved, by (microbatch, chunk), from F to B; queues of
    weight gradients from B to W; the sum of losses."""

    def __init__(self, of: Pipeline, microbatches: Sequence[Microbatch], scale: float, kinds: set[str]) -> None:
        self.of, self.microbatches, self.scale = of, microbatches, scale
        self.keep, self.split = "B" in kinds, "W" in kinds
        self.total: Array = of.like.dtype.type(0).astype(np.float64)
        self.saved: dict[tuple[int, int], Any] = {}

    def run(self, action: Action, entering: Array | None, wgrad: WGrad) -> Array | None:
        """Execute an action on what comes in, an activation or a gradient; returns what goes out."""
        key = action.microbatch, action.chunk
        if action.kind == "F":
            leaving, kept = self._forward(action, entering)
            if self.keep:  # else nothing comes back for it
                self.saved[key] = kept
            return leaving
        kept = self.saved.pop(key)
        if action.kind == "W":
            kept.flush(wgrad)
            return None
        queue = Queue()
        leaving = self._backward(action.chunk, entering, kept, queue if self.split else wgrad)
        if self.split:
            self.saved[key] = queue
        return leaving

    def _forward(self, action: Action, x: Array | None) -> tuple[Array | None, Any]:
        batch = self.microbatches[action.microbatch]
        y, kept = self.of.stages[action.chunk].forward(batch.inputs if x is None else x)
        if not self._is_last(action.chunk):
            return y, (kept, None)
        loss, from_loss = self.of.loss.forward((y, batch.targets))
        self.total = self.total + loss
        return None, (kept, from_loss)

    def _backward(self, chunk: int, dy: Array | None, kept: Any, wgrad: WGrad) -> Array:
        kept, from_loss = kept
        if self._is_last(chunk):
            dy = self.of.loss.backward(self.scale, from_loss, now)[0]
        del from_loss
        return self.of.stages[chunk].backward(dy, kept, wgrad)

    def _is_last(self, chunk: int) -> bool:
        pp, schedule = self.of.pp, self.of.schedule
        return schedule.stage(pp.rank, pp.size, chunk) == schedule.stages(pp.size) - 1
