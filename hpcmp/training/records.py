"""Records of a run on its disk: files with one JSON object a line, which end no run and survive what befell them."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

log = logging.getLogger("hpcmp")


class Records:
    """Appends records to ``path``; a disk that is full, gone or read-only costs records, never the run.

    The first failure is a warning; each later record is tried again, and is a line of its own whatever a failure left.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failed = False

    def write(self, record: dict[str, Any]) -> None:
        """One record, on one line."""
        try:
            with self.path.open("ab+", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                torn = end and os.pread(file.fileno(), 1, end - 1) not in (b"\n", b"")
                line = b"\n" * bool(torn) + json.dumps(record).encode() + b"\n"
                if file.write(line) != len(line):
                    raise OSError("no room for a whole line")
        except OSError as error:
            self._tell(error)

    def keep(self, wanted: Any) -> None:
        """Drop the records for which ``wanted`` is false, and lines that are none; all stay if that fails."""
        try:
            if not self.path.exists():
                return
            found, damaged = read_records(self.path)
            kept = [record for record in found if wanted(record)]
            if damaged or len(kept) != len(found):
                temporary = self.path.with_name(f".{self.path.name}.new")
                temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
                temporary.replace(self.path)
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self.failed:
            log.warning("%s: %s; training goes on without", self.path, error.strerror or error)
        self.failed = True


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a file, and how many of its lines are none: cut off, damaged. Raises OSError."""
    found: list[dict[str, Any]] = []
    damaged = 0
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
                record = None
            if isinstance(record, dict):
                found.append(record)
            else:
                damaged += bool(line.strip())
    return found, damaged
