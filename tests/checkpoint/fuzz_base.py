"""What the fuzz targets share."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Protocol

from hpcmp.errors import InputError

LARGE = 64 << 20  # bytes of an array that a target does not ask for, since whoever asks gets it


@dataclass
class Damage:
    """What was done to an input. forged: with care, so that digests fit and other numbers may well be read."""

    notes: list[str]
    forged: bool = False


class Target(Protocol):
    """A reader under test. An input is the folder ``run``; what lies beside it, in ``outside``, must never be read."""

    def prepare(self, folder: Path, outside: Path) -> None:
        """Make good inputs, once: in ``folder``, and others by the same names in ``outside``, which exists."""

    def damage(self, draw: Random, run: Path, outside: Path) -> Damage:
        """Make a damaged input in the place of the one before."""

    def read(self, run: Path) -> str:
        """Let the reader loose: "refused", "same" if all is as it was, "other" if it is not."""


def refusal(error: InputError) -> str:
    """ "refused", if the message is one that a terminal and a log can bear."""
    text = str(error)
    assert text.isprintable() and len(text) < 1500, f"a message of {len(text)} characters: {text[:200]!r}"
    return "refused"


class Folder:
    """The files of a folder, in memory."""

    def __init__(self, folder: Path) -> None:
        self.files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def restore(self, folder: Path, clear: bool = True) -> None:
        """Write them to ``folder``, from which all else is removed first."""
        if clear and folder.exists():
            shutil.rmtree(folder)
        for name, data in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
