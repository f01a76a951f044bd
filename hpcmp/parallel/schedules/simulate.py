"""Times any schedule, and refuses a wrong one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from .actions import Action, Kind, Schedule

#: The costs of F, B and W.
Costs = tuple[float, float, float]


@dataclass(frozen=True)
class Simulation:
    """What a schedule does with given costs.

    time: of the whole step; bubble: the share of it that the busiest rank idles; peak: for each rank, the most
    microbatches, counted once for each chunk, whose activations it holds at once; starts, ends: when each (rank,
    action) does.
    """

    time: float
    bubble: float
    peak: list[int]
    starts: dict[tuple[int, Action], float]
    ends: dict[tuple[int, Action], float]


def simulate(
    schedule: Schedule, size: int, microbatches: int, costs: Costs | Sequence[Costs] = (1, 1, 1), send: float = 0
) -> Simulation:
    """Run ``schedule`` on ``size`` ranks with the costs of F, B and W of a virtual stage (the same for all, or one
    triple for each), and ``send`` for a message between ranks.

    B of a schedule without W actions costs both. Raises ValueError if the schedule is incomplete, repeats an action,
    takes one before its cause on the same rank, or cannot go on (deadlock).
    """
    todo = [list(schedule(rank, size, microbatches)) for rank in range(size)]
    split = any(action.kind == "W" for rank in todo for action in rank)
    each = _each(costs, schedule.stages(size))
    for rank, actions in enumerate(todo):
        complete(rank, actions, microbatches, schedule.chunks, split)
    ends: dict[tuple[int, Action], float] = {}
    starts: dict[tuple[int, Action], float] = {}
    clock, busy, place, held, peak = [0.0] * size, [0.0] * size, [0] * size, [0] * size, [0] * size
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(todo):
            while place[rank] < len(actions):
                action = actions[place[rank]]
                cause = schedule.cause(rank, size, action)
                if cause is not None and cause not in ends:
                    break
                arrival = 0.0 if cause is None else ends[cause] + (send if cause[0] != rank else 0.0)
                f, b, w = each[schedule.stage(rank, size, action.chunk)]
                cost = {"F": f, "B": b if split else b + w, "W": w}[action.kind]
                starts[rank, action] = max(clock[rank], arrival)
                clock[rank] = ends[rank, action] = starts[rank, action] + cost
                busy[rank] += cost
                held[rank] += (action.kind == "F") - (action.kind == ("W" if split else "B"))
                peak[rank] = max(peak[rank], held[rank])
                place[rank] += 1
                moved = True
    stuck = {
        rank: str(actions[at]) for rank, (actions, at) in enumerate(zip(todo, place, strict=True)) if at < len(actions)
    }
    if stuck:
        raise ValueError(f"{schedule.name}: deadlock, the ranks wait at {stuck}")
    time = max(clock)
    return Simulation(time, 1 - max(busy) / time if time else 0.0, peak, starts, ends)


def _each(costs: Costs | Sequence[Costs], stages: int) -> list[Costs]:
    if isinstance(costs[0], int | float):
        return [cast(Costs, costs)] * stages
    if len(costs) != stages:
        raise ValueError(f"costs of {len(costs)} virtual stages, and there are {stages}")
    return list(cast("Sequence[Costs]", costs))


def complete(rank: int, actions: list[Action], microbatches: int, chunks: int, split: bool) -> None:
    """Raise ValueError unless a rank's actions are all there, once, F before B before W. split: whether there are W."""
    kinds: tuple[Kind, ...] = ("F", "B", "W") if split else ("F", "B")
    wanted = {Action(kind, i, c) for kind in kinds for i in range(microbatches) for c in range(chunks)}
    when = {action: at for at, action in enumerate(actions)}
    if len(actions) != len(when) or set(actions) != wanted:
        odd = sorted(set(actions) ^ wanted) or sorted(a for at, a in enumerate(actions) if when[a] != at)
        raise ValueError(f"rank {rank} misses or repeats {', '.join(map(str, odd[:4]))}")
    for action in wanted:
        order = [when[action._replace(kind=kind)] for kind in kinds]
        if order != sorted(order):
            i, chunk = action.microbatch, f" in chunk {action.chunk}" if chunks > 1 else ""
            raise ValueError(f"rank {rank} takes microbatch {i} out of order{chunk}")
