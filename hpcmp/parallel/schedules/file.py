"""Schedules as text files: any schedule can be written, edited and used.

    # comments, and empty lines, anywhere
    chunks 2                        virtual stages a rank (1 if not said)
    placement v                     or loop (if not said): which virtual stage a chunk is (see Schedule)
    0: F0 F1 F2 F0.1 B0.1 W0.1 ...  the actions of rank 0, F B or W, microbatch, and .chunk where that is not 0
    1: F0 F0.1 B0.1 ...             one line a rank, in order

A file is for as many ranks as it has lines, and for as many microbatches as it names or fewer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import InputError
from .actions import Action, Schedule, first
from .simulate import complete, simulate

_HEADER = {"chunks": "a number of at least 1", "placement": "loop or v"}


def write_schedule(schedule: Schedule, size: int, microbatches: int, path: str | os.PathLike[str]) -> None:
    """Write what ``size`` ranks do with ``microbatches`` microbatches, as ``read_schedule`` takes it."""
    lines = [f"# {schedule.name}: {size} ranks, {microbatches} microbatches"]
    lines += [f"chunks {schedule.chunks}", f"placement {schedule.placement}"]
    lines += [f"{rank}: {' '.join(map(str, schedule(rank, size, microbatches)))}" for rank in range(size)]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_schedule(path: str | os.PathLike[str]) -> Schedule:
    """The schedule in a file, checked: complete, in order, free of deadlock. Raises InputError naming file and line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"schedule {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    header: dict[str, Any] = {"chunks": 1, "placement": "loop"}
    ranks: list[list[Action]] = []
    where: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        words, place = line.partition("#")[0].split(), f"schedule {path}, line {number}"
        if not words:
            continue
        if words[0] in _HEADER:
            header[words[0]] = _header(words, bool(ranks), place)
        elif words[0] == f"{len(ranks)}:":
            ranks.append([_action(word, header["chunks"], place) for word in words[1:]])
            where.append(place)
        else:
            raise InputError(f"{place}: expected chunks, placement or {len(ranks)}:, found {words[0]!r}")
    if not ranks:
        raise InputError(f"schedule {path}: no line of a rank, such as 0: F0 F1 B0 B1")
    most = 1 + max((action.microbatch for actions in ranks for action in actions), default=-1)

    def order(rank: int, size: int, microbatches: int) -> Iterator[Action]:
        if size != len(ranks):
            raise InputError(f"schedule {path} is for {len(ranks)} pipeline ranks, and there are {size}")
        if microbatches > most:
            raise InputError(f"schedule {path} is for up to {most} microbatches, and there are {microbatches}")
        return first(ranks[rank], microbatches)

    made = Schedule(str(path), order, header["chunks"], header["placement"])
    split = any(action.kind == "W" for actions in ranks for action in actions)
    for rank, (actions, place) in enumerate(zip(ranks, where, strict=True)):
        try:
            complete(rank, actions, most, made.chunks, split)
        except ValueError as error:
            raise InputError(f"{place}: {error}") from None
    try:
        simulate(made, len(ranks), most)
    except ValueError as error:
        raise InputError(f"schedule {error}") from None
    return made


def _header(words: list[str], late: bool, place: str) -> int | str:
    key, values = words[0], words[1:]
    if late:
        raise InputError(f"{place}: {key} must stand before the ranks")
    if key == "placement" and values in (["loop"], ["v"]):
        return values[0]
    if key == "chunks" and len(values) == 1 and re.fullmatch("[1-9][0-9]*", values[0]):
        return int(values[0])
    raise InputError(f"{place}: {key}: expected {_HEADER[key]}, found {' '.join(values)!r}")


def _action(word: str, chunks: int, place: str) -> Action:
    found = re.fullmatch(r"([FBW])([0-9]+)(?:\.([0-9]+))?", word)
    if not found:
        raise InputError(f"{place}: expected an action such as F0, B12 or W3.1, found {word!r}")
    action = Action(found[1], int(found[2]), int(found[3] or 0))  # type: ignore[arg-type]
    if action.chunk >= chunks:
        raise InputError(f"{place}: {word}: there is no chunk {action.chunk}, chunks is {chunks}")
    return action
