"""What this process is given: its cores, its threads, its memory, and the shared libraries that it has loaded."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def cores() -> frozenset[int]:
    """The cores that this process may use."""
    return frozenset(os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1))


def threads() -> int:
    """How many threads this process is asked to compute with: OMP_NUM_THREADS, if it is a number (the first of a list),
    else one for each of its cores."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isascii() and first.isdigit() and int(first) else len(cores())


def loaded(pattern: str) -> list[Path]:
    """The libraries of this process whose file name ``pattern`` matches; none where there is no /proc."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {Path(line.split(maxsplit=5)[5]) for line in lines if line.count("/")}
    return sorted(path for path in paths if re.fullmatch(pattern, path.name))


def keep_memory() -> None:
    """Have the C library (glibc) keep the memory of arrays that are freed, for those that come.

    By itself it maps every large array anew, and the system zeroes each page at its first use. Kept, the arrays of a
    step lie where those of the step before did, and after the first step no page is asked for. Memory that a process
    has had stays its own. Nothing is done where the environment tunes malloc, or the C library is another one.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
