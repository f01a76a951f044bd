"""``hpcmp train`` on ranks that die: ``python -m tests.training.dying WHERE,... train ...``, with place:rank:when.

The rank, a number in MPI's world, does it when it comes to the place for the ``when``-th time or, where that is a part
of a step, in step ``when``. Places: step, backward, evaluate, close (of the communicators, at the end), and the phases
of a save. ``+`` and a name after ``when`` do something else there than to die by SIGKILL: sleep, raise, stop (it asks
to), or segfault. ``deaf`` as a WHERE: nothing is revoked.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from hpcmp.checkpoint import directory
from hpcmp.cli import main
from hpcmp.comm.detect import start_mpi
from hpcmp.comm.mesh import Mesh
from hpcmp.comm.recorder import RECORDER
from hpcmp.parallel import pipeline
from hpcmp.training.engine import Engine

MPI = start_mpi()
PLAN = {tuple(where.partition("+")[0].split(":")): where.partition("+")[2] for where in sys.argv[1].split(",")}
count: Counter[str] = Counter()


def fail() -> None:
    raise ValueError("planted")


DEEDS: dict[str, Callable[[], Any]] = {
    "": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "sleep": lambda: time.sleep(600),
    "raise": fail,
    "stop": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "segfault": lambda: ctypes.string_at(0),
}


def at(place: str, when: int | None = None) -> None:
    """This rank is at a place. At the end it says how many engines there are in its memory."""
    if place == "close":
        engines = sum(isinstance(each, Engine) for each in gc.get_objects())
        sys.stderr.write(f"rank {MPI.COMM_WORLD.rank}: {engines} engines\n")
    count[place] += 1
    key = place, str(MPI.COMM_WORLD.rank), str(count[place] if when is None else when)
    if key in PLAN:
        DEEDS[PLAN.pop(key)]()


def plant(owner: Any, name: str, place: str, number: Callable[..., int | None] = lambda *given: None) -> None:
    """Before ``owner.name`` is called, this rank is at ``place``."""
    right = getattr(owner, name)

    def planted(*given: Any, **more: Any) -> Any:
        at(place, number(*given))
        return right(*given, **more)

    setattr(owner, name, planted)


plant(Engine, "begin", "step", lambda engine, number, *data: number)
plant(Engine, "evaluate", "evaluate")
plant(pipeline._Step, "_backward", "backward", lambda step, *given: step.of.cursor.place.step)
plant(Mesh, "close", "close")
directory.failpoint = lambda phase, rank: at(phase)
if ("deaf",) in PLAN:
    from hpcmp.comm import survive

    survive.revoke = lambda: (survive._held.clear(), RECORDER.forget())
sys.exit(main(sys.argv[2:]))
