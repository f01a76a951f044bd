"""A run's own directory on a node: the steps in it, and that nothing else is ever touched.

step_00001050-1f3c9a2e8b7d6054/         a step, and the beginning of the SHA-256 of its manifest
.step_00001100.tmp-4711@node7.../       being written or removed, or left by a process that died meanwhile
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Collection
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from ..errors import CheckpointError
from ..plain import read_whole
from . import directory, manifest, reader
from .manifest import Manifest

_STEP = re.compile(r"(step_[0-9]{8,18})-[0-9a-f]{16}")
_LEFT = re.compile(r"\.step_[0-9]{8,18}\.tmp-.+")


def own(root: Path) -> None:
    """Have the directory ``root``, for this user alone. Raises OSError if it is a link or others may write in it."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check(root)


def folder(root: Path, step: int, text: bytes) -> Path:
    """The directory of the step whose manifest is ``text``."""
    return root / f"{directory.step_name(step)}-{sha256(text).hexdigest()[:16]}"


def commit(temporary: Path, final: Path) -> None:
    """Make a written directory the step ``final``. Raises OSError."""
    try:
        temporary.rename(final)
    except OSError as error:
        raise OSError(f"{final}: {error.strerror}: is the directory of each node its own?") from None


def look(root: Path) -> dict[str, tuple[Manifest, bytes, list[str]]]:
    """The steps in ``root``: name -> the manifest, its text, those of its files that are there."""
    found = {}
    for path in _places(root, _STEP):
        try:
            text = read_whole(path / manifest.NAME, manifest.LIMIT)
            content = manifest.parse(text, path / manifest.NAME)
        except (CheckpointError, OSError):  # other nodes have it too
            continue
        if folder(root, content.step, text) == path:
            found[path.name] = content, text, held(path, content)
    return found


def held(path: Path, content: Manifest) -> list[str]:
    """The files of ``content`` that are in ``path``, of the right length."""
    found = []
    for name, file in content.files.items():
        with suppress(CheckpointError):
            reader.check_size(path / name, file)
            found.append(name)
    return found


def prune(root: Path, kept: Collection[Path]) -> None:
    """Remove all steps but these, and what dead processes left. Nobody may be saving in ``root``."""
    for path in _places(root, _STEP, _LEFT):
        if path in kept:
            continue
        with suppress(OSError):
            if _STEP.fullmatch(path.name):  # first to a name that is swept, should this process die now
                path = path.rename(directory.hidden(root / path.name.partition("-")[0], "tmp"))
            directory.discard(path)


def _check(root: Path) -> None:
    status = root.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise OSError(errno.EPERM, "not a directory of this user alone", str(root))


def _places(root: Path, *patterns: re.Pattern[str]) -> list[Path]:
    """The directories in ``root``, no links, whose names are of one of the patterns; none if it is not ours."""
    try:
        _check(root)
        paths = [path for path in sorted(root.iterdir()) if any(p.fullmatch(path.name) for p in patterns)]
    except OSError:  # whose cause a save meets, and tells
        return []
    return [path for path in paths if path.is_dir() and not path.is_symlink()]
