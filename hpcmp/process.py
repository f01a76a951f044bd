"""What this process is given: its cores, its threads, and the shared libraries that it has loaded."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path


def cores() -> frozenset[int]:
    """The cores that this process may use."""
    return frozenset(os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1))


def threads(*variables: str) -> int:
    """How many threads this process is asked to compute with: the first of ``variables`` and OMP_NUM_THREADS that the
    environment has a number for (the first of a list), else one for each of its cores."""
    for variable in (*variables, "OMP_NUM_THREADS"):
        first = os.environ.get(variable, "").split(",")[0].strip()
        if first.isascii() and first.isdigit() and int(first):
            return int(first)
    return len(cores())


def loaded(pattern: str) -> list[Path]:
    """The libraries of this process whose file name ``pattern`` matches; none where there is no /proc."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {Path(line.split(maxsplit=5)[5]) for line in lines if line.count("/")}
    return sorted(path for path in paths if re.fullmatch(pattern, path.name))
