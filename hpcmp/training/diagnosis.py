"""What a run's ranks left about its end: which rank is missing where, who disagrees on what, by which error one ended.

Whatever ranks have called under one number of one communicator must be the same; a rank whose last number is below
another's has not come to that call. A rank that others wait for may wait itself, for another one: those that wait for
nobody come first.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..comm.check import ranks_text
from .dumps import FOLDER, VERDICT, Alive, Call, Dump, Group, in_library, read_alive, read_dump
from .failures import Failure, read_failures

_SHOWN = 16  # lines at most of a kind


class Finding(NamedTuple):
    """One thing that is wrong; ``culprits`` are the ranks that others wait for."""

    text: str
    culprits: tuple[int, ...] = ()


def diagnose(run: Path) -> list[str]:
    """What happened, in lines of text, the verdict first; of the run directory ``run``, by the dumps in its folder
    ``diagnosis``. [] if no rank left one, nor an error, nor crashed. Never raises for what the files hold: a damaged
    one is named."""
    folder = run / FOLDER
    alive = dict(read_alive(folder)) if folder.is_dir() else {}
    verdict = folder / VERDICT
    said = verdict.stat().st_mtime if verdict.exists() else math.inf  # a rank that was stuck and came back is none
    paths = sorted(path for path in folder.glob("rank_*.json") if re.fullmatch(r"rank_\d{5,9}\.json", path.name))
    read = [(path, read_dump(path)) for path in paths]
    dumps = {found.rank: found for _, found in read if found is not None}
    damaged = [f"{path} is damaged" for path, found in read if found is None]
    alive = {rank: each for rank, each in alive.items() if not (each.stuck and (rank in dumps or each.seen > said))}
    crashed = [Finding(f"rank {rank} {_crash(each)}") for rank, each in alive.items() if each.crash]
    failures = read_failures(folder)
    for each in failures:
        if each.rank in dumps:
            dumps[each.rank] = replace(dumps[each.rank], place="the error above")
    if not (paths or crashed or failures):
        return []
    dead = {rank for rank, each in alive.items() if each.crash}
    blocked = {rank for rank, found in dumps.items() if found.blocked}
    waits = _missing(dumps) + _messages(dumps)
    roots = [finding for finding in waits if not blocked.issuperset(finding.culprits)]
    others = [finding for finding in waits if finding not in roots]
    gone = [finding for finding in _gone(dumps) if not dead.issuperset(finding.culprits)]
    kinds = [crashed, gone, _disagreements(dumps), _ended(failures, dumps), roots, others]
    if others and not any(kinds[:5]):
        kinds.insert(5, [Finding("ranks wait for one another:")])
    if not any(kinds):
        kinds.append(_stalled(dumps))
    lines = [line for kind in kinds for line in _shown([finding.text for finding in kind])]
    lines += _shown(damaged) + _shown(list(_silent(dumps, alive, {*dead, *_culprits(gone)})))
    if dumps:
        lines.append(f"the last operations of every rank, and where its threads are: {folder}/rank_*.json")
    return ["".join(c if c.isprintable() else "?" for c in line) for line in lines]


def _culprits(findings: list[Finding]) -> list[int]:
    return [rank for finding in findings for rank in finding.culprits]


def _shown(lines: list[str]) -> list[str]:
    more = len(lines) - _SHOWN
    return lines[:_SHOWN] + ([f"and {more} more like this"] if more > 0 else [])


def _crash(alive: Alive) -> str:
    """What happened, by the first line of a stack, and the innermost call."""
    lines = [line.strip() for line in alive.crash.splitlines() if line.strip()]
    heads = [at for at, line in enumerate(lines) if line.startswith("Thread ")]  # the main one's is the last
    current = next((at for at, line in enumerate(lines) if line.startswith("Current thread")), [0, *heads][-1])
    calls = [line for line in lines[current:] if line.startswith("File ")]
    own = [call for call in calls if not in_library(call)]
    place = "".join(f", {call}" for call in (own or calls)[:1])
    what = "is stuck in a call that keeps Python from running" if alive.stuck else f"has crashed: {lines[0]}"
    return f"{what}{place}{f' ({alive.owner})' if alive.owner else ''}"


def _gone(dumps: dict[int, Dump]) -> list[Finding]:
    gone = {rank: owner for found in dumps.values() for rank, owner in found.gone.items() if rank not in dumps}
    why = "a signal or want of memory has ended it"
    return [Finding(f"rank {rank} is gone: {owner}; {why}", (rank,)) for rank, owner in sorted(gone.items())]


def _ended(failures: list[Failure], dumps: dict[int, Dump]) -> list[Finding]:
    """By what ranks have ended, the first of them first, and those together that say the same."""
    by: dict[str, list[int]] = defaultdict(list)
    for failure in failures:
        found = dumps.get(failure.rank)
        call = next((call for call in reversed(found.calls) if call.failed), None) if found else None
        where = f", in {_told(call)}" if call else f", at {failure.place}" if failure.place else ""
        by[failure.error + where + (_sent(call, failure.rank, dumps) if call else "")].append(failure.rank)
    alone = failures and len(by) == 1 and len(failures) == failures[0].size  # all say it, as of bad input
    return [Finding(said if alone else f"{ranks_text(ranks)}: {said}") for said, ranks in by.items()]


def _sent(received: Call, rank: int, dumps: dict[int, Dump]) -> str:
    """Of a message that has failed, what the other side sent."""
    if received.operation == "recv" and received.peer is not None:
        group, peer = received.group, received.group.ranks[received.peer]
        for call in reversed(dumps[peer].calls if peer in dumps else []):
            to = call.group.ranks[call.peer] if call.operation == "send" and call.peer is not None else None
            if (call.group, to, call.tag) == (group, rank, received.tag):
                return f"; rank {peer} last sent it {call.what.removeprefix('send ')} at {call.site}"
    return ""


def _disagreements(dumps: dict[int, Dump]) -> list[Finding]:
    """Of each communicator, the first number under which ranks have called different things."""
    called: dict[Group, dict[int, dict[int, Call]]] = defaultdict(lambda: defaultdict(dict))
    for rank, found in dumps.items():
        for call in found.calls:
            if call.sequence is not None:
                called[call.group][call.sequence][rank] = call
    findings = []
    for group, numbers in called.items():
        for number, calls in sorted(numbers.items()):
            failed = any(call.failed for call in calls.values())
            what = {rank: call.whole if failed else call.what for rank, call in sorted(calls.items())}
            if len(set(what.values())) > 1:
                by: dict[str, list[int]] = defaultdict(list)
                for rank, text in what.items():
                    by[f"{text} at {calls[rank].site}"].append(rank)
                said = [f"{ranks_text(ranks)}: {text}" for text, ranks in by.items()]
                findings.append(Finding(f"ranks disagree in collective {number} of {_name(group)}: {'; '.join(said)}"))
                break
    return findings


def _missing(dumps: dict[int, Dump]) -> list[Finding]:
    """Of each communicator, the first collective in which some ranks wait and to which others have not come."""
    waiting: dict[tuple[Group, int], dict[int, Call]] = defaultdict(dict)
    for rank, found in dumps.items():
        for call in found.blocked:
            if call.sequence is not None:
                waiting[call.group, call.sequence][rank] = call
    findings, told = [], set()
    for (group, number), calls in sorted(waiting.items(), key=lambda item: item[0][1]):
        absent = [rank for rank in group.ranks if rank not in dumps or dumps[rank].begun.get(group, -1) < number]
        if not absent or group in told:
            continue
        told.add(group)
        call, have = next(iter(calls.values())), "have" if len(absent) > 1 else "has"
        places: dict[str, list[int]] = defaultdict(list)
        for rank in absent:
            places[_where(dumps.get(rank))].append(rank)
        where = "; ".join(f"{ranks_text(ranks)} {_verb(place, len(ranks))}" for place, ranks in places.items())
        findings.append(
            Finding(
                f"{ranks_text(absent)} {have} not joined {_numbered(call)} at {call.site}, in which "
                f"{_waiters(calls, dumps)}; {where}",
                tuple(absent),
            )
        )
    return findings


def _messages(dumps: dict[int, Dump]) -> list[Finding]:
    """What ranks wait for that another one should have sent or received."""
    findings = []
    for rank, found in sorted(dumps.items()):
        for call in found.blocked:
            if call.tag is not None and call.peer is not None:
                peer = call.group.ranks[call.peer]
                text = f"rank {rank} waits in {_told(call)} since {found.time - (call.waits or 0):.0f} s; "
                findings.append(Finding(f"{text}rank {peer} {_where(dumps.get(peer))}", (peer,)))
    return findings


def _stalled(dumps: dict[int, Dump]) -> list[Finding]:
    """Collectives that all ranks have called, and that do not end; or that nobody waits at all."""
    calls: dict[tuple[Group, int | None], dict[int, Call]] = defaultdict(dict)
    for rank, found in dumps.items():
        for call in found.blocked:
            calls[call.group, call.sequence][rank] = call
    findings = [
        Finding(
            f"all ranks have joined {_numbered(next(iter(each.values())))} at {next(iter(each.values())).site}, and "
            f"{_waiters(each, dumps)}: its messages do not arrive"
        )
        for each in calls.values()
    ]
    return findings or [Finding(f"rank {rank} {_where(found)}") for rank, found in sorted(dumps.items())]


def _silent(dumps: dict[int, Dump], alive: dict[int, Alive], told: set[int]) -> Iterator[str]:
    """Ranks that left no dump, where others did, and of which nothing else has been ``told``."""
    if dumps:
        last = max(found.time for found in dumps.values())
        for rank in range(max(found.size for found in dumps.values())):
            if rank not in dumps and rank not in told:
                sign = alive.get(rank)
                seen = f"{max(0.0, last - sign.seen):.0f} s before the dumps" if sign else "unknown"
                who = f" ({sign.owner})" if sign and sign.owner else ""
                yield f"rank {rank}{who} left no dump; its last sign of life: {seen}"


def _where(found: Dump | None) -> str:
    """What a rank does: ``waits in ...`` or ``is at ...``."""
    if found is None:
        return "left no dump that can be read"
    if found.blocked:
        call = found.blocked[0]
        return f"waits in {_numbered(call)} at {call.site} since {found.time - (call.waits or 0):.0f} s"
    return f"is at {found.place}"


def _verb(place: str, ranks: int) -> str:
    """What ``_where`` says of one rank, of so many that are there."""
    return place if ranks == 1 else re.sub("^is ", "are ", re.sub("^waits ", "wait ", place))


def _waiters(calls: dict[int, Call], dumps: dict[int, Dump]) -> str:
    since = max(dumps[rank].time - (call.waits or 0) for rank, call in calls.items())
    return f"{ranks_text(list(calls))} wait{'s' if len(calls) == 1 else ''} since {since:.0f} s"


def _told(call: Call) -> str:
    """``all_reduce 1234 of dp (float32, 4096) at FILE:LINE``, ``recv (float32, 5) of pp from rank 1 (tag 6) at ..``."""
    if call.tag is None or call.peer is None:
        return f"{_numbered(call)} at {call.site}"
    way = f"{'to' if call.operation == 'send' else 'from'} rank {call.group.ranks[call.peer]} (tag {call.tag})"
    return f"{call.what} of {_name(call.group)} {way} at {call.site}"


def _numbered(call: Call) -> str:
    """``all_reduce 1234 of dp (float32, 4096)``."""
    number = f" {call.sequence}" if call.sequence else ""  # a message has none; the making of the group is 0
    facts = call.what[len(call.operation) :]
    return f"{call.operation}{number} of {_name(call.group)}{facts}"


def _name(group: Group) -> str:
    return {"": "a group", "all": "all ranks"}.get(group.axes, group.axes)
