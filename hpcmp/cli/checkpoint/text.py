"""What the actions of ``hpcmp checkpoint`` print, and what their arguments mean."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

PATH_HELP = "a checkpoint, such as run/checkpoints/step_00001000, or the folder of a run's checkpoints (the newest)"
WIDTH = 118  # of a line on the terminal


def table(rows: Sequence[Sequence[str]], aligns: str) -> list[str]:
    """Aligned lines of the rows; ``aligns``: < or > for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, aligns, widths, strict=True)).rstrip() for row in rows
    ]


def pairs(values: dict[str, Any]) -> str:
    """``key=value key=value``."""
    return " ".join(f"{key}={item if isinstance(item, str) else json.dumps(item)}" for key, item in values.items())


def moment(saved: str) -> str:
    """An ISO time in UTC to the second."""
    return f"{saved[:19].replace('T', ' ')} UTC"


def size(count: float) -> str:
    """Bytes for a person: ``1.2 GB``."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        count /= 1000
        if count < 999.95 or unit == "PB":
            break
    return f"{count:,.1f} {unit}"


def plural(count: int, word: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{count:,} {word}{'s' * (count != 1)}"


def cut(lines: Sequence[str]) -> str:
    """Lines that fit the terminal, as one text. What could command a terminal becomes ``?``."""
    shown = ["".join(c if c.isprintable() else "?" for c in line) for line in lines]
    return "\n".join(line if len(line) <= WIDTH else line[: WIDTH - 3] + "..." for line in shown)
