"""What the actions of ``hpcmp checkpoint`` print, and what their arguments mean."""

from __future__ import annotations

import itertools
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

PATH_HELP = "a checkpoint, such as run/checkpoints/step_00001000, or the folder of a run's checkpoints (the newest)"
WIDTH = 118  # of a line on the terminal
LINES = 8  # of one value, at most


def table(rows: Sequence[Sequence[str]], aligns: str) -> list[str]:
    """Aligned lines of the rows; ``aligns``: < or > for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, aligns, widths, strict=True)).rstrip() for row in rows
    ]


def value(item: Any) -> str:
    """A value of JSON as a word or more: a text as it is, a table as ``key=value key=value``, nothing as ``none``."""
    if isinstance(item, dict):
        return " ".join(f"{key}={value(inner)}" for key, inner in item.items())
    return "none" if item is None else item if isinstance(item, str) else json.dumps(item)


def sizes(layout: dict[str, Any]) -> str:
    """What a layout shares out: ``pp=2 tp=4``, or ``one rank``."""
    return value({key: n for key, n in layout.items() if type(n) is int and n > 1}) or "one rank"


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


def groups(names: Iterable[str], kind: Callable[[str], Any] = lambda name: None) -> list[tuple[str, list[str]]]:
    """The names, those that differ in the numbers in them alone, and are of the same ``kind``, under one heading.

    Such as ``blocks/0-1,3/up`` for blocks/0/up, blocks/1/up and blocks/3/up; in the order of the numbers.
    """
    found: dict[Any, list[str]] = {}
    for name in names:
        found.setdefault((re.sub(r"(?<=/)\d+(?=/)", "#", name), kind(name)), []).append(name)
    return [(_joined(members), members) for members in sorted(found.values(), key=lambda names: natural(names[0]))]


def natural(name: str) -> list[tuple[int, str]]:
    """By which names are sorted so that block 2 comes before block 10."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in name.split("/")]


def _joined(names: list[str]) -> str:
    words = []
    for column in zip(*(name.split("/") for name in names), strict=True):
        numbers = sorted({int(word) for word in column}) if len(set(column)) > 1 else []
        runs = []
        for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
            members = [number for _, number in run]
            runs.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else f"{members[0]}")
        words.append(",".join(runs) or column[0])
    return "/".join(words)


def short(text: str, most: int) -> str:
    """A text of at most ``most`` characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def wrapped(label: str, text: str) -> list[str]:
    """The text after its label, in lines that fit the terminal: LINES of them at most."""
    lines = textwrap.wrap(
        text[: WIDTH * LINES],
        WIDTH,
        initial_indent=label,
        subsequent_indent=" " * len(label),
        max_lines=LINES,
        placeholder=" ...",
        break_on_hyphens=False,
    )
    return lines or [label.rstrip()]


def page(lines: Sequence[str]) -> str:
    """The lines as one text. What could command a terminal becomes ``?``."""
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)
