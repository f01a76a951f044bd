"""The directory of a run's checkpoints: its names, the pointer ``latest``, and how things appear in it or go, at once.

step_00000100/                                  a checkpoint
latest                                          the name of the newest one, and the digest of its manifest
lock, .lock-...                                 which run has the directory (lock.py)
.step_00000100.tmp-4711@node7.12-1f3c9a2e/      being written, or being removed, by process 4711 of node7
.step_00000100.old-4711@node7.12-1f3c9a2e/      a checkpoint set aside while one of the same step takes its place
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from ..errors import CheckpointError, InputError
from ..plain import read_whole
from . import lock, manifest, owner
from .manifest import Manifest
from .reader import check_size
from .writer import sync

LATEST = "latest"
STEP = re.compile(r"step_[0-9]{8,18}")
IDLE = 3600.0  # seconds without a change after which another machine's temporary counts as left behind
_HIDDEN = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-(?P<pid>[0-9]+)@(?P<host>.+)-[0-9a-f]{8}")
_log = logging.getLogger(__name__)


def step_name(step: int) -> str:
    """The name of a step's directory."""
    return f"step_{step:08d}"


def hidden(path: Path, kind: str) -> Path:
    """A new name beside ``path`` that says who uses it, and whether it may be removed ("tmp") or needed ("old")."""
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}@{_host()}-{secrets.token_hex(4)}")


def check_folder(path: Path) -> None:
    """Raise InputError if there can be no folder ``path``: it, or what it would lie in, is something else."""
    for place in (path, *path.parents):
        if os.path.lexists(place):
            if not place.is_dir():
                raise InputError(f"{place}: is no folder")
            return


def begin(root: Path, step: int) -> Path:
    """A new temporary directory for the checkpoint of ``step``; what dead processes left behind is removed first.

    Raises InUseError if another process has the lock of ``root``.
    """
    if not root.exists():
        root.mkdir(parents=True, exist_ok=True)
        sync(root.parent)
    lock.check(root)
    sweep(root)
    temporary = hidden(root / step_name(step), "tmp")
    temporary.mkdir()
    return temporary


def commit(temporary: Path, final: Path, text: bytes, at: Callable[[str], None]) -> None:
    """Make a written directory the checkpoint ``final``, with the manifest ``text``, and let ``latest`` name it.

    A checkpoint of the same step is set aside until then, and put back if the new one cannot take its place. Raises
    InUseError if another process has taken the lock since ``begin``.
    """
    lock.check(final.parent)
    at("manifest")
    write_file(temporary / manifest.NAME, text)
    sync(temporary)
    at("rename")
    aside = final.rename(hidden(final, "old")) if final.exists() else None
    if aside:
        at("replace")
    try:
        temporary.rename(final)
    except OSError:
        if aside:
            aside.rename(final)
        raise
    sync(final.parent)
    at("pointer")
    point(final.parent, final.name, hashlib.sha256(text).hexdigest())
    if aside:
        discard(aside)


def write_file(path: Path, text: bytes) -> None:
    """Write a new file and force it to the disk."""
    with open(path, "xb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def point(root: Path, name: str, digest: str) -> None:
    """Let ``latest`` name a checkpoint, at once: whoever reads it sees the old text or the new."""
    temporary = hidden(root / LATEST, "tmp")
    try:
        write_file(temporary, f"{name} {digest}\n".encode())
        os.replace(temporary, root / LATEST)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(root)


def pointed(root: Path) -> tuple[str, str]:
    """The name of a checkpoint and the digest that ``latest`` holds, which may be damaged. Raises OSError."""
    name, _, digest = read_whole(root / LATEST, 256).decode(errors="replace").strip().partition(" ")
    return name, digest


def discard(path: Path) -> None:
    """Remove a directory or file; a checkpoint is renamed first, so that half of one is never taken for a whole."""
    try:
        if not path.name.startswith("."):
            path = path.rename(hidden(path, "tmp"))
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        _log.warning("cannot remove %s: %s", path, error.strerror)


def sweep(root: Path, names: str = rf"{STEP.pattern}|{LATEST}") -> None:
    """Remove dead processes' temporaries for ``names``, a pattern, and put back what one of them had set aside."""
    for path in sorted(root.iterdir()):
        match = _HIDDEN.fullmatch(path.name)
        if match is None or not re.fullmatch(names, match["name"]):
            continue
        if not _abandoned(path, int(match["pid"]), match["host"]):
            continue
        place = root / match["name"]
        if match["kind"] == "old" and not place.exists():
            path.rename(place)
        else:
            discard(path)


def inspect(directory: Path) -> tuple[Manifest, str]:
    """The manifest of a checkpoint and its digest, if all its files are there in full length; else CheckpointError."""
    found, digest = manifest.read(directory / manifest.NAME)
    if STEP.fullmatch(directory.name) and found.step != _step(directory.name):
        raise CheckpointError(f"{directory}: holds step {found.step}: renamed, or mixed with another")
    for name, stored in found.files.items():
        check_size(directory / name, stored)
    return found, digest


def scan(
    root: Path, wanted: Callable[[int], bool] = lambda step: True
) -> list[tuple[Path, Manifest | CheckpointError]]:
    """Every checkpoint below ``root``, the last one saved first, and those that are not complete at the end.

    One that was set aside counts as long as nothing is in its place. Only ``wanted`` steps are looked at.
    """
    found: list[tuple[Path, Manifest | CheckpointError]] = []
    for path in sorted(root.iterdir(), reverse=True):
        match = _HIDDEN.fullmatch(path.name)
        aside = match and match["kind"] == "old" and not (root / match["name"]).exists()
        name = match["name"] if match and aside else path.name
        if STEP.fullmatch(name) and wanted(_step(name)) and path.is_dir() and not path.is_symlink():
            try:
                found.append((path, inspect(path)[0]))
            except CheckpointError as error:
                found.append((path, error))
    return sorted(found, key=lambda item: item[1].saved if isinstance(item[1], Manifest) else "", reverse=True)


def checkpoints(path: Path | str) -> list[Path]:
    """The checkpoints at ``path``, the last one saved first, incomplete ones at the end: itself, or those in it.

    Empty if there is none, or no such directory. Raises CheckpointError if it cannot be read.
    """
    path = Path(path)
    if not os.path.isdir(path):
        return []
    try:
        return [path] if _is_checkpoint(path) else [place for place, _ in scan(path)]
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


def find(path: Path) -> tuple[Path, Manifest]:
    """The checkpoint that ``path`` is, or the newest complete one below it: that which ``latest`` names, if it is."""
    if _is_checkpoint(path):
        return path, inspect(path)[0]
    problems = []
    try:
        name, digest = pointed(path)
        if STEP.fullmatch(name) and not (path / name).is_symlink():
            found, actual = inspect(path / name)
            if actual == digest:
                return path / name, found
        problems.append(f"{path / LATEST}: does not name a checkpoint that is there")
    except CheckpointError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{path / LATEST}: {error.strerror}")
    try:
        candidates = scan(path)
    except OSError as error:
        raise CheckpointError(f"{path}: no checkpoint: {error.strerror}") from None
    problems += [
        str(entry) for _, entry in candidates if isinstance(entry, CheckpointError) and str(entry) not in problems
    ]
    for place, entry in candidates:
        if isinstance(entry, Manifest):
            _log.warning("%s; taking %s instead", "; ".join(problems), place.name)
            return place, entry
    elsewhere = f", but in {path / 'checkpoints'}" if checkpoints(path / "checkpoints") else ""
    raise CheckpointError("; ".join(problems) if candidates else f"{path}: there is no checkpoint in it{elsewhere}")


def failpoint(phase: str, rank: int) -> None:
    """For tests: die at once, as in a crash, if the variable HPCMP_FAILPOINT is ``phase:rank`` or ``phase:all``."""
    if os.environ.get("HPCMP_FAILPOINT") in (f"{phase}:{rank}", f"{phase}:all"):
        os.kill(os.getpid(), signal.SIGKILL)


def _step(name: str) -> int:
    return int(name.removeprefix("step_"))


def _is_checkpoint(path: Path) -> bool:
    return bool(STEP.fullmatch(path.name)) or os.path.lexists(path / manifest.NAME)


def _host() -> str:
    """This machine, or container: where a process number means what it means here."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return f"{socket.gethostname()}.{space}"


def _abandoned(path: Path, pid: int, host: str) -> bool:
    """Whether the maker of ``path`` is gone: no such process here; from elsewhere, nothing changed for IDLE seconds."""
    if host == _host():
        return pid == os.getpid() or not owner.running(pid)
    try:
        times = [item.lstat().st_mtime for item in (path, *(path.iterdir() if path.is_dir() else ()))]
    except OSError:  # it is changing at this moment
        return False
    return bool(time.time() - max(times) > IDLE)
