"""The files of ``diagnosis``, in a run's directory: what each rank leaves there about itself, written and read."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.owner import Owner
from ..comm.recorder import RECORDER

FOLDER = "diagnosis"  # in run.directory; and in it:
HANG = "hang"  # asks every rank for its dump
VERDICT = "verdict.txt"  # what was said

FORMAT = "hpcmp diagnosis 1"
_LARGEST = 2**26  # bytes of a file that is read
_MOST = 2**22  # ranks
_PACKAGE = Path(__file__).resolve().parents[1]
#: What a damaged file may raise.
DAMAGE = (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError)


def dump_name(rank: int) -> str:
    """The file of a rank's dump."""
    return f"rank_{rank:05d}.json"


def alive_name(rank: int) -> str:
    """The file that says who a rank is, and by its time when it was last seen alive; a crash adds a stack to it."""
    return f"rank_{rank:05d}.alive"


def dump(folder: Path, rank: int, size: int, why: str, gone: Mapping[int, str]) -> None:
    """Write what this process knows to its file in ``folder``; ``gone``: the ranks that it has seen die."""
    told = {"pid": os.getpid(), "why": why, "gone": dict(gone), **RECORDER.snapshot(), "threads": stacks()}
    write_json(folder / dump_name(rank), rank, size, told)


def write_json(path: Path, rank: int, size: int, told: dict[str, Any]) -> None:
    """Write what a rank tells to its file, all of it or nothing. Raises OSError."""
    told = {"format": FORMAT, "rank": rank, "size": size, "time": time.time()} | told
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(told, indent=1), encoding="utf-8")
    part.replace(path)


def stacks() -> dict[str, list[str]]:
    """Where every thread is: {its name: ["file:line function: code", ...]}, the innermost call last; the main one
    first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main, found = threading.main_thread().ident, {}
    for number, frame in sorted(sys._current_frames().items(), key=lambda item: item[0] != main):
        found[names.get(number, f"thread {number}")] = listed(traceback.extract_stack(frame))
    return found


def listed(lines: Iterable[traceback.FrameSummary]) -> list[str]:
    """``file:line function: code`` of each."""
    return [f"{_short(line.filename)}:{line.lineno} {line.name}: {line.line}".rstrip(": ") for line in lines]


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(_PACKAGE.parent) if path.is_relative_to(_PACKAGE) else path)


@dataclass(frozen=True)
class Group:
    """A communicator, as ranks know it alike."""

    axes: str
    ranks: tuple[int, ...]
    number: int


@dataclass(frozen=True)
class Call:
    """A record of a dump; see ``hpcmp.comm.recorder``. Times in seconds since 1970. failed: whether an error has ended
    the wait for it."""

    group: Group
    sequence: int | None
    operation: str
    dtype: str | None
    count: int | None
    peer: int | None
    tag: int | None
    site: str
    waits: float | None
    failed: bool

    @property
    def what(self) -> str:
        """What ranks must have alike: ``all_reduce (float32, 4096)``."""
        return self._said(None if self.operation == "all_to_all" else self.count)

    @property
    def whole(self) -> str:
        """The same with the count of an ``all_to_all``, which need not be alike."""
        return self._said(self.count)

    def _said(self, count: int | None) -> str:
        root = None if self.peer is None or self.tag is not None else f"root {self.group.ranks[self.peer]}"
        facts = [str(fact) for fact in (self.dtype, count, root) if fact is not None]
        return f"{self.operation} ({', '.join(facts)})" if facts else self.operation


@dataclass(frozen=True)
class Dump:
    """What a rank knew. begun: how many collectives of each communicator it has come to. place: where its main thread
    was."""

    rank: int
    size: int
    time: float
    gone: dict[int, str]
    begun: dict[Group, int]
    calls: list[Call]
    place: str

    @property
    def blocked(self) -> list[Call]:
        """What the rank waited in."""
        return [call for call in self.calls if call.waits is not None]


def read_dump(path: Path) -> Dump | None:
    """The dump in a file; None if it is damaged."""
    try:
        told = json.loads(read_text(path))
        if told["format"] != FORMAT:
            return None
        groups = [Group(str(g["axes"]), tuple(map(int, g["ranks"])), int(g["number"])) for g in told["groups"]]
        begun = {group: int(g["begun"]) for group, g in zip(groups, told["groups"], strict=True)}
        calls = [_call(record, groups) for record in told["records"]]
        gone = {int(rank): str(owner) for rank, owner in told["gone"].items()}
        place = innermost([str(line) for line in next(iter(told["threads"].values()), [])])
        rank, size = int(told["rank"]), int(told["size"])
        return Dump(rank, size, float(told["time"]), gone, begun, calls, place) if 0 <= rank < size < _MOST else None
    except DAMAGE:
        return None


def _call(record: dict[str, Any], groups: list[Group]) -> Call:
    def number(name: str) -> int | None:
        return None if record[name] is None else int(record[name])

    group, peer = groups[int(record["group"])], number("peer")
    if peer is not None:
        group.ranks[peer]  # IndexError
    dtype = None if record["dtype"] is None else str(record["dtype"])
    waits = None if record["waits"] is None else float(record["waits"])
    numbers = number("sequence"), str(record["operation"]), dtype, number("count"), peer, number("tag")
    return Call(group, *numbers, str(record["site"]), waits, record["state"] == "failed")


def innermost(calls: list[str]) -> str:
    """The innermost call that is not of a library."""
    own = [call for call in calls if not in_library(call)]
    return (own or calls or ["?"])[-1]


def in_library(call: str) -> bool:
    """Whether the file of a call is one of Python's, or of a package that is installed beside it."""
    return re.search(r"/lib(64)?/python|<frozen", call) is not None and "/hpcmp/" not in call


@dataclass(frozen=True)
class Alive:
    """A rank's sign of life. seen: when it gave the last, in seconds since 1970; crash: the stack of one that crashed
    or is stuck, else ""."""

    owner: Owner | None
    seen: float
    crash: str

    @property
    def stuck(self) -> bool:
        """Whether it has not crashed: it gave no sign of life for too long."""
        return self.crash.startswith("Timeout")


def read_alive(folder: Path) -> Iterator[tuple[int, Alive]]:
    """Those of all ranks that have not ended in order."""
    for path in sorted(folder.glob("rank_*.alive")):
        if (match := re.fullmatch(r"rank_(\d{5,9})\.alive", path.name)) is None:
            continue
        try:
            seen, text = path.stat().st_mtime, read_text(path)
            _, end = json.JSONDecoder().raw_decode(text)
        except OSError:
            continue
        except (ValueError, RecursionError):
            end = 0
        yield int(match[1]), Alive(Owner.parse(text[:end].encode()), seen, text[end:].strip() if end else "")


def read_text(path: Path) -> str:
    """What a file holds, as far as it is text, and its beginning if it is very long. Raises OSError."""
    with path.open("rb") as file:
        return file.read(_LARGEST).decode(errors="replace")
