"""Storage: whether every host can write in a directory, sees the same one, and how much room is left."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ...errors import reason
from .base import Check, Ranks, Trouble, attempt, some, troubles
from .network import SKEW

LITTLE = 2**30  # bytes of free space below which a checkpoint may not fit
FILES = 1000  # free inodes below which the files of a run may not fit
SYNC = 2.0  # seconds for a megabyte to be on the disk
_PROBE = 1 << 20


@dataclass(frozen=True)
class Place:
    """A directory as a host finds it. why: why it cannot be written; free, files: bytes and inodes that are left (None
    where there is no such limit); sync: seconds that a megabyte took to the disk; locks: why no file can be locked;
    ahead: seconds that the file server's clock is ahead of this host's; kind: of the file system."""

    why: str = ""
    free: int = 1 << 60
    files: int | None = None
    sync: float = 0.0
    locks: str = ""
    ahead: float = 0.0
    kind: str = ""


def existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that is there: what is not yet, a run makes."""
    path = path.expanduser().absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def probe(path: Path) -> Place:
    """Write a file there, and remove it."""
    start, locks, ahead = time.monotonic(), "", 0.0
    try:
        with tempfile.NamedTemporaryFile(prefix=".hpcmp-doctor-", dir=path) as file:
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
            took = time.monotonic() - start
            ahead = os.fstat(file.fileno()).st_mtime - time.time()
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                locks = reason(error)
    except OSError as error:
        return Place(why=error.strerror or reason(error), kind=file_system(path))
    left = os.statvfs(path)
    free, files = left.f_bavail * left.f_frsize, left.f_favail if left.f_files else None
    return Place("", free, files, took, locks, 0.0 if abs(ahead) < took else ahead, file_system(path))


def file_system(path: Path) -> str:
    """The kind of the file system that ``path`` is on, as Linux names it; "" elsewhere."""
    found, longest, path = "", -1, path.resolve()
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        mounted, _, kind = line.partition(" - ")
        point = Path(mounted.split()[4].encode().decode("unicode_escape"))
        if path.is_relative_to(point) and len(point.parts) >= longest:
            found, longest = kind.split()[0], len(point.parts)
    return found


def directory_checks(ranks: Ranks, name: str, path: Path, needed: int = LITTLE, *, firm: bool = False) -> list[Check]:
    """The lines of a directory, named ``name``, that needs ``needed`` bytes; ``firm``: a run cannot do without it.

    The first rank of each host writes there; then every rank looks for a file of rank 0's. Collective.
    """
    look = partial(_look, path)
    seen: list[Any] = ranks.all(attempt(look) if ranks.rank in ranks.leaders else None)
    sight = attempt(partial(_mark, path)) if ranks.rank == 0 else None
    sight = ranks.first(sight)
    marked = sight if isinstance(sight, Path) else None
    sees = ranks.all(attempt(marked.exists) if marked else True)
    if ranks.rank == 0 and marked:
        attempt(marked.unlink)
    blind = {host for host, each in zip(ranks.hosts, sees, strict=True) if each is False}
    places = [(ranks.hosts[rank], seen[rank]) for rank in ranks.leaders]
    places += [(host, each) for host, each in zip(ranks.hosts, sees, strict=True) if isinstance(each, Trouble)]
    return judge(name, path, places, blind, needed, firm=firm)


def current_checks(ranks: Ranks) -> list[Check]:
    """The lines of the directory in which rank 0 was started. Collective."""
    path = ranks.first(attempt(Path.cwd) if ranks.rank == 0 else Trouble(""))
    if isinstance(path, Trouble):
        advice = "`cd` to one that is there: it was removed, or its file server does not answer"
        return [Check("directory", "warn", path.why, advice)]
    return directory_checks(ranks, "directory", path)


def _look(path: Path) -> Place:
    return probe(existing(path))


def _mark(path: Path) -> Path:
    """A new file there, that other hosts are to see."""
    descriptor, name = tempfile.mkstemp(prefix=".hpcmp-doctor-", dir=existing(path))
    os.close(descriptor)
    return Path(name)


def judge(
    name: str,
    path: Path,
    seen: Sequence[tuple[str, Place | Trouble]],
    blind: set[str],
    needed: int = LITTLE,
    *,
    firm: bool = False,
) -> list[Check]:
    """What is to be said of a directory that hosts saw so, and that those in ``blind`` have another one for."""
    bad: Literal["problem", "warn"] = "problem" if firm else "warn"
    lines = [Check(each.name, bad, f"{path} {each.value}", each.advice) for each in troubles(name, seen)]
    places = [(host, place) for host, place in seen if isinstance(place, Place)]
    if lines or not places:
        return lines
    closed = [(host, place) for host, place in places if place.why]
    open_ = [(host, place) for host, place in places if not place.why]
    if closed:
        value = f"{path} is not writable on {some(host for host, _ in closed)}: {closed[0][1].why}"
        advice = "start in a directory on a file system for results (scratch, work)"
        if firm:
            advice = f"set {name} to one on a file system for results, or ask for `mount -o remount,rw`"
        return [Check(name, bad, value, advice)]
    if blind:
        value = f"{path} is another one on {some(blind)}"
        advice = "start in a directory on a file system that all hosts share, such as scratch; not in /tmp"
        return [Check(name, bad, value, advice)]
    free = min(place.free for _, place in open_)
    files = min((place.files for _, place in open_ if place.files is not None), default=FILES)
    kind = open_[0][1].kind
    value = f"writable, {free / 1e9:.1f} GB free{f' ({kind})' if kind else ''}"
    if free < needed:
        advice = f"free {(needed - free) / 1e9:.1f} GB (`du -sh *`, `quota -s`), or set {name} to another file system"
        advice = advice if firm else "a checkpoint may not fit: free some space (`quota -s`), or set run.directory"
        lines.append(Check(name, bad, f"{value}, {needed / 1e9:.1f} GB needed", advice))
    elif files < FILES:
        advice = "remove small files: `du --inodes -d1 | sort -n`; or take another file system"
        lines.append(Check(name, bad, f"{value}, and room for {files} files more", advice))
    else:
        lines.append(Check(name, "ok", value))
    return lines + [line for host, place in open_ for line in _oddities(name, host, place)][:3]


def _oddities(name: str, host: str, place: Place) -> list[Check]:
    """What is odd about a directory that can be written."""
    lines = []
    if place.sync > SYNC:
        value = f"a megabyte took {place.sync:.1f} s to the disk on {host}"
        lines.append(Check(name, "warn", value, "take a faster file system, or checkpoint.asynchronous=true"))
    if place.locks:
        advice = "`export HDF5_USE_FILE_LOCKING=FALSE` for other programs of HDF5, or ask for the mount option flock"
        lines.append(Check(name, "warn", f"files cannot be locked on {host}: {place.locks}", advice))
    if abs(place.ahead) > SKEW:
        value = f"the file server's clock is {place.ahead:+.1f} s from that of {host}"
        lines.append(Check(name, "warn", value, f"ask for time synchronisation of both (`chronyc tracking` on {host})"))
    return lines
