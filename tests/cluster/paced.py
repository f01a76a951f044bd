"""``hpcmp`` with steps that take their time, and say when each is done: ``python -m tests.cluster.paced train ...``.

What happens to a job (a signal, a limit, the end of a node) must find it at its steps; a tiny model's are over before.
So each lasts HPCMP_PACE seconds more, asleep: that costs no core, and changes no number. Not so once the job has been
started again: then it may hurry. In the run's directory each rank writes a line of JSON a step into rank0.jsonl, ...:
when it was done, which it was, by which process on which host.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from hpcmp.cli import main
from hpcmp.training.engine import Engine

_begin = Engine.begin


@functools.cache
def pace(path: Path) -> float:
    """Seconds that a step lasts more in this process, whose journal is ``path``."""
    return 0.0 if path.exists() else float(os.environ.get("HPCMP_PACE", "0"))


def begin(self: Engine, number: int, *args: Any, **more: Any) -> Any:
    """``Engine.begin``, its pace, and a line about it."""
    path = Path(self.config.run.directory) / f"rank{self.mesh.rank}.jsonl"
    seconds = pace(path)
    running = _begin(self, number, *args, **more)
    time.sleep(seconds)
    who = {"pid": os.getpid(), "host": socket.gethostname(), "ranks": self.mesh.size}
    with path.open("a") as file:
        file.write(json.dumps({"time": time.time(), "step": number} | who) + "\n")
    return running


if __name__ == "__main__":
    Engine.begin = begin  # type: ignore[method-assign]
    sys.exit(main())
