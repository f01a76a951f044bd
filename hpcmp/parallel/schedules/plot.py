"""A picture of a schedule."""

from __future__ import annotations

import os
from collections.abc import Sequence

from .actions import Kind, Schedule
from .simulate import Costs, simulate

_COLOURS: dict[Kind, tuple[float, float, float]] = {
    "F": (0.25, 0.47, 0.85),
    "B": (0.20, 0.65, 0.45),
    "W": (0.95, 0.65, 0.20),
}
_NAMES: dict[Kind, str] = {"F": "forward", "B": "backward", "W": "weight gradients"}


def plot(
    schedules: Schedule | Sequence[Schedule],
    size: int,
    microbatches: int,
    costs: Costs | Sequence[Costs],
    path: str | os.PathLike[str],
) -> None:
    """Draw what ``size`` ranks do, as ``simulate`` times it: a row a rank, a box an action with its microbatch.

    F, B and W have colours of their own, later chunks lighter ones. Several schedules stand one below the other on one
    axis of time, each with the costs of a whole rank: ``costs`` (of all the virtual stages of a rank together, or a
    triple for each virtual stage). The ending of ``path`` chooses the format. Needs matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    drawn = [schedules] if isinstance(schedules, Schedule) else list(schedules)
    figure = Figure(figsize=(12, 0.6 + len(drawn) * (0.5 + 0.28 * size)), layout="constrained")
    panels = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for axes, schedule in zip(panels, drawn, strict=True):
        found = simulate(schedule, size, microbatches, _shared(costs, schedule))
        for (rank, action), start in found.starts.items():
            width = found.ends[rank, action] - start
            lighter = 0.55 * action.chunk / max(1, schedule.chunks - 1)
            colour = tuple(c + (1 - c) * lighter for c in _COLOURS[action.kind])
            axes.broken_barh([(start, width)], (rank - 0.45, 0.9), facecolor=colour, edgecolor="white", linewidth=0.5)
            if width > 0.008 * found.time:
                axes.text(start + width / 2, rank, str(action.microbatch), ha="center", va="center", fontsize=6)
        axes.set_title(f"{schedule.name}: bubble {found.bubble:.1%}", fontsize=9, loc="left")
        axes.set_yticks(range(size), [f"rank {rank}" for rank in range(size)], fontsize=8)
        axes.set_ylim(size - 0.5, -0.5)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("time")
    panels[-1].set_xlim(left=0)
    patches = [Patch(facecolor=_COLOURS[kind], label=_NAMES[kind]) for kind in _COLOURS]
    figure.legend(handles=patches, ncols=3, fontsize=8, loc="outside upper right", frameon=False)
    figure.savefig(path, dpi=130)


def _shared(costs: Costs | Sequence[Costs], schedule: Schedule) -> Costs | Sequence[Costs]:
    """The costs of a rank as those of each of its chunks."""
    if isinstance(costs[0], int | float):
        f, b, w = costs
        return f / schedule.chunks, b / schedule.chunks, w / schedule.chunks  # type: ignore[operator]
    return costs
