"""What a schedule is: actions, and which virtual stage of the model each chunk of a rank is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "W"]
Placement = Literal["loop", "v"]


class Action(NamedTuple):
    """What a rank does next: F, B or W of a microbatch in one of the virtual stages (chunks) that the rank holds."""

    kind: Kind
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


#: (rank, size, microbatches) -> the rank's actions
Order = Callable[[int, int, int], Iterable[Action]]


@dataclass(frozen=True)
class Schedule:
    """The order of each rank's actions, and where the virtual stages lie.

    ``schedule(rank, size, microbatches)`` yields the actions of one of ``size`` ranks. Each rank holds ``chunks``
    virtual stages; chunk c of rank r, of p ranks, is virtual stage

        placement "loop":  c p + r                                            (Narayanan et al., 2021)
        placement "v":     c p + r for even c, c p + (p - 1 - r) for odd c    (Qi et al., 2024: up, and down again)
    """

    name: str
    order: Order
    chunks: int = 1
    placement: Placement = "loop"

    def __call__(self, rank: int, size: int, microbatches: int) -> Iterator[Action]:
        return iter(self.order(rank, size, microbatches))

    def stages(self, size: int) -> int:
        """How many virtual stages ``size`` ranks hold together."""
        return self.chunks * size

    def stage(self, rank: int, size: int, chunk: int = 0) -> int:
        """The virtual stage that is chunk ``chunk`` of ``rank``."""
        return chunk * size + self._turned(rank, size, chunk)

    def holder(self, stage: int, size: int) -> tuple[int, int]:
        """The inverse of ``stage``: (rank, chunk)."""
        chunk, place = divmod(stage, size)
        return self._turned(place, size, chunk), chunk

    def cause(self, rank: int, size: int, action: Action) -> tuple[int, Action] | None:
        """The rank and action that makes what ``action`` takes in: the F of the stage before, the B of the next."""
        return self._beside(rank, size, action, {"F": -1, "B": 1, "W": 0}[action.kind])

    def effect(self, rank: int, size: int, action: Action) -> tuple[int, Action] | None:
        """The inverse of ``cause``: the rank and action that takes in what ``action`` makes."""
        return self._beside(rank, size, action, {"F": 1, "B": -1, "W": 0}[action.kind])

    def forward_only(self) -> Schedule:
        """The schedule of an evaluation, of the same virtual stages: no backward.

        Every rank takes as many microbatches as there are ranks through one chunk after the other, so that no rank
        waits but for the first microbatch to come. The order is the same on every rank, which excludes a deadlock.
        """

        def order(rank: int, size: int, microbatches: int) -> Iterator[Action]:
            for group in range(0, microbatches, size):
                for chunk in range(self.chunks):
                    for i in range(group, min(group + size, microbatches)):
                        yield Action("F", i, chunk)

        return dataclasses.replace(self, name=f"{self.name}, forward only", order=order)

    def _beside(self, rank: int, size: int, action: Action, by: int) -> tuple[int, Action] | None:
        stage = self.stage(rank, size, action.chunk) + by
        if by == 0 or not 0 <= stage < self.stages(size):
            return None
        holder, chunk = self.holder(stage, size)
        return holder, action._replace(chunk=chunk)

    def _turned(self, place: int, size: int, chunk: int) -> int:
        return size - 1 - place if self.placement == "v" and chunk % 2 else place


def first(actions: Iterable[Action], microbatches: int) -> Iterator[Action]:
    """``actions`` without those of later microbatches: how an order for many microbatches serves for few.

    What is left keeps its order, and no microbatch waits for another, so it is right if the whole is.
    """
    return (action for action in actions if action.microbatch < microbatches)
