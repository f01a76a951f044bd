"""Activations and gradients on their way from one virtual stage to the next."""

from __future__ import annotations

from collections.abc import Callable

from ..arrays import Array
from ..comm.base import Communicator, Pending
from ..cursor import Place
from .schedules import Action, Schedule


class Messages:
    """What the actions of one step pass to each other: over the group ``pp``, or by hand where two consecutive virtual
    stages lie on one rank (the turn of a V, a pipeline of one rank).

    A message is known by the action that it is for. Arrays are like ``like``.
    """

    def __init__(self, pp: Communicator, schedule: Schedule, like: Array) -> None:
        self.pp, self.schedule, self.like = pp, schedule, like
        self.coming: dict[Action, Pending] = {}
        self.here: dict[Action, Array] = {}
        self.leaving: list[Pending] = []

    def expect(self, action: Action, shape: Callable[[Place], tuple[int, ...]], place: Place) -> None:
        """Begin to receive what ``action`` takes in, if it comes from another rank and has not been begun."""
        cause = self.schedule.cause(self.pp.rank, self.pp.size, action)
        if cause is not None and cause[0] != self.pp.rank and action not in self.coming:
            received = self.pp.recv(shape(place), self.like.dtype, cause[0], self._tag(action), like=self.like)
            self.coming[action] = received

    def take(self, action: Action) -> Array | None:
        """What ``action`` takes in, once it is there; None where nothing enters: the ends of the model, and W."""
        if action in self.coming:
            return self.coming.pop(action).wait()
        return self.here.pop(action, None)

    def give(self, action: Action, array: Array | None) -> None:
        """Pass on what ``action`` made to the action that it is the cause of, if there is one."""
        effect = self.schedule.effect(self.pp.rank, self.pp.size, action)
        if effect is not None:
            rank, target = effect
            if rank == self.pp.rank:
                self.here[target] = array
            else:
                self.leaving.append(self.pp.send(array, rank, self._tag(target)))
        self.leaving = [send for send in self.leaving if not send.test()]

    def finish(self) -> None:
        """Wait until everything has been sent."""
        for send in self.leaving:
            send.wait()
        self.leaving = []

    def _tag(self, action: Action) -> int:
        """Different for all that one rank may send to another in a step."""
        return 2 * (action.microbatch * self.schedule.chunks + action.chunk) + (action.kind == "B")
