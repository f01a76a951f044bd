"""Limits: memory, what ulimit allows, where temporary files and shared memory lie."""

from __future__ import annotations

import os
import resource
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from . import cgroup
from .base import Check, Ranks, Subject, by_host, some

GIB = 2**30
MEMORY = GIB // 2  # bytes that a rank takes before it has a model: Python, NumPy, MPI, compiled kernels
LONGEST = 80  # characters of TMPDIR: names of sockets end at 107, and launchers put some 25 behind it


@dataclass(frozen=True)
class Limits:
    """What a rank may have. soft: resource limits by their ulimit letter, in bytes, files or seconds, those that are
    set; free, total: bytes of memory of the host, or of the job on it; shm: what is wrong with /dev/shm, "" if nothing;
    mine: this user's bytes in it; tmp, tmp_wrong: the folder of temporary files, and what is wrong with it."""

    host: str
    soft: dict[str, int] = field(default_factory=dict)
    free: int = 1 << 60
    total: int = 1 << 60
    grouped: bool = False
    infiniband: bool = False
    shm: str = ""
    mine: int = 0
    tmp: str = ""
    tmp_wrong: str = ""


_LETTERS = {
    "n": resource.RLIMIT_NOFILE,
    "s": resource.RLIMIT_STACK,
    "v": resource.RLIMIT_AS,
    "f": resource.RLIMIT_FSIZE,
    "t": resource.RLIMIT_CPU,
    "l": resource.RLIMIT_MEMLOCK,
    "u": resource.RLIMIT_NPROC,
}


def look(ranks: Ranks, window_mb: float) -> Limits:
    """This rank's; ``window_mb``: communication.window_mb of the run."""
    soft = {letter: resource.getrlimit(number)[0] for letter, number in _LETTERS.items()}
    free, total = host_memory()
    group = cgroup.memory()
    if group and group[1] < free:
        total, free = group
    shm = _shared_memory(ranks.here, window_mb)
    return Limits(
        ranks.host,
        {letter: value for letter, value in soft.items() if value != resource.RLIM_INFINITY},
        free,
        total,
        bool(group and group[0] == total),
        any(Path("/sys/class/infiniband").glob("*")),
        shm,
        _mine(Path("/dev/shm")) if shm else 0,
        *_temporary(),
    )


def host_memory() -> tuple[int, int]:
    """The bytes of memory of this host that are free or can be freed, and all of them."""
    words = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    sizes = {name.rstrip(":"): int(size) * 1024 for name, size, *_ in words}
    return sizes["MemAvailable"], sizes["MemTotal"]


def _shared_memory(here: int, window_mb: float) -> str:
    """What is wrong with /dev/shm for ``here`` ranks with a window each."""
    if here == 1:
        return ""
    from ...comm.staging import HEADER
    from ...comm.window import no_room

    return no_room(here * (int(window_mb * 2**20) + HEADER))


def _mine(folder: Path) -> int:
    return sum(s.st_size for s in (path.lstat() for path in folder.glob("*")) if s.st_uid == os.getuid())


def _temporary() -> tuple[str, str]:
    """The folder of temporary files, and what is wrong with it."""
    asked = os.environ.get("TMPDIR", "/tmp")
    if len(asked) > LONGEST:
        return asked, f"its name has {len(asked)} characters, too many for the sockets of MPI's launchers"
    try:
        with tempfile.TemporaryFile(dir=asked) as file:
            file.write(bytes(1 << 16))
            file.flush()
    except OSError as error:
        return asked, f"not writable: {error.strerror}"
    return asked, ""


def ulimit_check(ranks: list[Limits]) -> Check | list[Check]:
    """The resource limits that end runs; a line for each that is too low, and one if none is."""
    checks = []
    for letter, (least, effect, advice) in _least(ranks).items():
        low = [rank for rank in ranks if letter in rank.soft and (least is None or rank.soft[letter] < least)]
        if low:
            value = (
                f"`ulimit -{letter}` is {_limit(letter, low[0].soft[letter])} on {some(r.host for r in low)}: {effect}"
            )
            checks.append(Check("ulimit", "warn", value, advice))
    soft = ranks[0].soft
    shown = ", ".join(f"-{letter} {_limit(letter, soft[letter])}" for letter in soft)
    return checks or Check("ulimit", "ok", shown or "no limits")


def _least(ranks: list[Limits]) -> dict[str, tuple[int | None, str, str]]:
    """For a limit: the least that will do (None: none will), what comes of less, and what to do about it."""
    files, processes = 512 + 2 * len(ranks), 256 + 64 * max(map(len, by_host(ranks).values()))
    least: dict[str, tuple[int | None, str, str]] = {
        "n": (files, "ranks run out of files and connections", f"`ulimit -n {max(files, 65536)}` in the job script"),
        "s": (4 << 20, "threads crash in deep calls", "`ulimit -s 8192` in the job script"),
        "v": (
            None,
            "libraries that reserve addresses fail, as CUDA does",
            "`ulimit -v unlimited` in the job script",
        ),
        "f": (None, "checkpoints end at that size", "`ulimit -f unlimited` in the job script"),
        "t": (
            None,
            "processes are killed after that",
            "`ulimit -t unlimited`; run in a batch job",
        ),
        "u": (processes, "threads cannot be started", f"`ulimit -u {max(processes, 4096)}` in the job script"),
    }
    if any(rank.infiniband for rank in ranks):
        advice = "`ulimit -l unlimited`, by limits.conf and by slurm.conf's PropagateResourceLimitsExcept=MEMLOCK"
        least["l"] = (1 << 30, "InfiniBand cannot register memory", advice)
    return least


def _limit(letter: str, value: int) -> str:
    return {"n": f"{value} files", "t": f"{value} s", "u": f"{value} processes"}.get(letter) or f"{value / 2**20:g} MiB"


def memory_check(ranks: list[Limits]) -> Check:
    """Whether each host has the memory for its ranks to start; what a model takes is in ``needs``."""
    host, there = min(by_host(ranks).items(), key=lambda item: item[1][0].free / len(item[1]))
    mine = there[0]
    of = "that the job may use" if mine.grouped else "of the host"
    value = f"{mine.free / GIB:.1f} GiB free, of {mine.total / GIB:.1f} {of} ({host}, {len(there)} ranks)"
    if mine.free >= MEMORY * len(there):
        return Check("memory", "ok", value)
    advice = "ask for more (`#SBATCH --mem=0`: all of a node's; `docker run --memory`), or start fewer ranks on a node"
    return Check("memory", "warn", value, advice)


def shared_memory_check(ranks: list[Limits]) -> Check:
    """Whether /dev/shm has room for the windows of a host's ranks."""
    small = [rank for rank in ranks if rank.shm]
    if not small:
        return Check("/dev/shm", "ok", "has room for the ranks of each host")
    value = f"too small on {some(rank.host for rank in small)}: {small[0].shm}"
    advice = "`docker run --shm-size=2g`, or ask for `mount -o remount,size=50% /dev/shm`"
    if small[0].mine > 2**20:
        advice = f"remove the {small[0].mine / 2**20:.0f} MiB that dead jobs left: `ls -l /dev/shm`; or {advice}"
    return Check("/dev/shm", "warn", value, advice)


def tmp_check(ranks: list[Limits]) -> Check:
    """Whether temporary files can be made."""
    bad = [rank for rank in ranks if rank.tmp_wrong]
    if not bad:
        return Check("TMPDIR", "ok", ranks[0].tmp)
    value = f"{bad[0].tmp} on {some(rank.host for rank in bad)}: {bad[0].tmp_wrong}"
    return Check("TMPDIR", "warn", value, "`export TMPDIR=/tmp`, or another short one on the nodes' own disks")


def subject(window_mb: float) -> Subject:
    """The limits, for windows of ``window_mb`` MiB a rank (communication.window_mb)."""
    return Subject(
        "limits", partial(look, window_mb=window_mb), (memory_check, ulimit_check, shared_memory_check, tmp_check)
    )
