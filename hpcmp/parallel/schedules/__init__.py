"""Pipeline schedules are data: a generator of actions for a rank. One runner executes any, one simulator times any.

An action is F (forward of a microbatch), B (its backward; of the input alone when the schedule has W actions) or W (its
weight gradients), in one of the rank's chunks. A schedule is right if, over all ranks, every F, B (and W) of every
microbatch and chunk occurs once, F before B before W, and no wait is circular: ``simulate`` proves it for given sizes.
"""

from __future__ import annotations

from collections.abc import Callable

from ...errors import InputError
from .actions import Action as Action
from .actions import Kind as Kind
from .actions import Order as Order
from .actions import Placement as Placement
from .actions import Schedule as Schedule
from .file import read_schedule as read_schedule
from .file import write_schedule as write_schedule
from .interleaved import interleaved
from .one_chunk import gpipe, one_f_one_b, zero_bubble_h1
from .plot import plot as plot
from .simulate import Costs as Costs
from .simulate import Simulation as Simulation
from .simulate import simulate as simulate
from .v import dual_pipe_v, zero_bubble_v

#: What makes the schedule of a name, given the number of chunks a rank for those that leave a choice.
SCHEDULES: dict[str, Callable[[int], Schedule]] = {
    "gpipe": lambda virtual: Schedule("gpipe", gpipe),
    "1f1b": lambda virtual: Schedule("1f1b", one_f_one_b),
    "interleaved": lambda virtual: Schedule("interleaved", interleaved(virtual), virtual),
    "zb-h1": lambda virtual: Schedule("zb-h1", zero_bubble_h1),
    "zb-v": lambda virtual: Schedule("zb-v", zero_bubble_v, 2, "v"),
    "dualpipe-v": lambda virtual: Schedule("dualpipe-v", dual_pipe_v, 2, "v"),
}


def make_schedule(name: str, virtual: int = 1) -> Schedule:
    """The schedule of a name in ``SCHEDULES``, or of a file: "file:PATH".

    virtual: the chunks of each rank, for "interleaved"; elsewhere 1, or the number that the schedule has. Raises
    InputError for another number, an unknown name, or a file that is no right schedule.
    """
    kind, colon, path = name.partition(":")
    if colon and kind == "file":
        made = read_schedule(path)
    elif name in SCHEDULES:
        made = SCHEDULES[name](virtual)
    else:
        raise InputError(f"unknown schedule {name!r}; there are {', '.join(SCHEDULES)}, file:PATH")
    if virtual not in (1, made.chunks):
        only = "" if colon else "; only interleaved takes another number"
        raise InputError(f"schedule {name} has {made.chunks} virtual stage(s) a rank, not {virtual}{only}")
    return made
