"""Pipeline schedules are data: a generator of actions for a rank. One runner executes any, one simulator times any.

An action is F (forward of a microbatch), B (its backward; of the input alone when the schedule has W actions) or W (its
weight gradients). A schedule is right if, over all ranks, every F, B (and W) of every microbatch occurs once, F before
B before W, and no wait is circular: ``simulate`` proves it for given sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "W"]


class Action(NamedTuple):
    """What a rank does next."""

    kind: Kind
    microbatch: int


Schedule = Callable[[int, int, int], Iterator[Action]]


def gpipe(rank: int, size: int, microbatches: int) -> Iterator[Action]:
    """All forwards, then all backwards. Huang et al., "GPipe", 2019. Keeps every microbatch's activations."""
    for i in range(microbatches):
        yield Action("F", i)
    for i in range(microbatches):
        yield Action("B", i)


def one_f_one_b(rank: int, size: int, microbatches: int) -> Iterator[Action]:
    """1F1B: as few forwards ahead as keep every stage fed, then one backward a forward.

    Narayanan et al., "PipeDream-Flush", 2021. Keeps at most size - rank microbatches; bubble (p-1)/(m+p-1).
    """
    ahead = min(size - 1 - rank, microbatches)
    for i in range(ahead):
        yield Action("F", i)
    for i in range(microbatches - ahead):
        yield Action("F", ahead + i)
        yield Action("B", i)
    for i in range(microbatches - ahead, microbatches):
        yield Action("B", i)


def zero_bubble_h1(rank: int, size: int, microbatches: int) -> Iterator[Action]:
    """ZB-H1: 1F1B whose weight gradients lag by ``rank`` microbatches, so that they fill the bubble.

    Qi et al., "Zero bubble pipeline parallelism", 2024, section 3.1: the memory of 1F1B, a third of its bubble.
    """
    done = 0
    for action in one_f_one_b(rank, size, microbatches):
        yield action
        if action.kind == "B" and action.microbatch >= rank:
            yield Action("W", done)
            done += 1
    for i in range(done, microbatches):
        yield Action("W", i)


def forward_only(rank: int, size: int, microbatches: int) -> Iterator[Action]:
    """Evaluation: no backward."""
    for i in range(microbatches):
        yield Action("F", i)


SCHEDULES: dict[str, Schedule] = {"gpipe": gpipe, "1f1b": one_f_one_b, "zb-h1": zero_bubble_h1}


@dataclass(frozen=True)
class Simulation:
    """What a schedule does with given costs.

    time: of the whole step; bubble: the share of it that the busiest rank idles; peak: for each rank, the most
    microbatches whose activations it holds at once; starts: when each (rank, action) starts.
    """

    time: float
    bubble: float
    peak: list[int]
    starts: dict[tuple[int, Action], float]


def simulate(
    schedule: Schedule, size: int, microbatches: int, costs: tuple[float, float, float] = (1, 1, 1), send: float = 0
) -> Simulation:
    """Run ``schedule`` on ``size`` stages with the costs of F, B and W, and ``send`` for a message.

    B of a schedule without W actions costs both. Raises ValueError if the schedule is incomplete, repeats an action,
    takes one before its cause on the same rank, or cannot go on (deadlock).
    """
    todo = [list(schedule(rank, size, microbatches)) for rank in range(size)]
    split = any(action.kind == "W" for rank in todo for action in rank)
    cost = {"F": costs[0], "B": costs[1] + (0 if split else costs[2]), "W": costs[2]}
    for rank, actions in enumerate(todo):
        _complete(rank, actions, microbatches, split)
    end: dict[tuple[int, Action], float] = {}
    starts: dict[tuple[int, Action], float] = {}
    clock, place, held, peak = [0.0] * size, [0] * size, [0] * size, [0] * size
    release = "W" if split else "B"
    while any(place[r] < len(todo[r]) for r in range(size)):
        moved = False
        for rank in range(size):
            while place[rank] < len(todo[rank]):
                action = todo[rank][place[rank]]
                cause = _cause(rank, size, action)
                if cause is not None and cause not in end:
                    break
                arrival = 0.0 if cause is None else end[cause] + send
                starts[rank, action] = max(clock[rank], arrival)
                clock[rank] = end[rank, action] = starts[rank, action] + cost[action.kind]
                held[rank] += (action.kind == "F") - (action.kind == release)
                peak[rank] = max(peak[rank], held[rank])
                place[rank] += 1
                moved = True
        if not moved:
            stuck = {rank: todo[rank][place[rank]] for rank in range(size) if place[rank] < len(todo[rank])}
            raise ValueError(f"schedule: deadlock, the ranks wait at {stuck}")
    time = max(clock)
    return Simulation(time, 1 - microbatches * sum(costs) / time if time else 0.0, peak, starts)


def _cause(rank: int, size: int, action: Action) -> tuple[int, Action] | None:
    """What another rank must have done before."""
    if action.kind == "F" and rank > 0:
        return rank - 1, action
    if action.kind == "B" and rank < size - 1:
        return rank + 1, action
    return None


def _complete(rank: int, actions: list[Action], microbatches: int, split: bool) -> None:
    kinds: tuple[Kind, ...] = ("F", "B", "W") if split else ("F", "B")
    wanted = {Action(kind, i) for kind in kinds for i in range(microbatches)}
    if len(actions) != len(set(actions)) or set(actions) != wanted:
        odd = sorted(set(actions) ^ wanted) or sorted(a for a in set(actions) if actions.count(a) > 1)
        raise ValueError(f"schedule: rank {rank} misses or repeats {odd[:4]}")
    when = {action: i for i, action in enumerate(actions)}
    for i in range(microbatches):
        order = [when[Action(kind, i)] for kind in kinds]
        if order != sorted(order):
            raise ValueError(f"schedule: rank {rank} takes microbatch {i} out of order")
