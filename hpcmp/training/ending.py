"""How a run has ended, or that it has not: what its directory tells, for who looks at it afterwards."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint import lock
from ..checkpoint.owner import Owner
from ..errors import InUseError

_SILENT = 3 * lock.BEAT  # seconds without a sign of life that are worth a word


class Ending(NamedTuple):
    """how: "finished", "stopped" (it may go on), "failed" (with a diagnosis), "killed", "running", "ended" (nobody says
    how), "new" (it has made no start). text: the same and why, in a line for a person."""

    how: str
    text: str


def ending(directory: Path, starts: list[dict[str, Any]], step: int, diagnosis: list[str]) -> Ending:
    """Of the run in ``directory``; starts: of its manifest, each with its ``end`` if it came to one in order; ``step``
    steps have been taken; diagnosis: of its last start. Nothing is changed."""
    after = f"after step {step:,}"
    end = starts[-1].get("end") if starts else None
    if isinstance(end, dict):
        return _in_order(end)
    if diagnosis:
        return Ending("failed", f"failed {after}: {diagnosis[0]}")
    if (held := _held(directory)) is not None:
        owner, lives = held
        if lives:
            return Ending("running", f"running, {after}: {owner}")
        told = "by a signal, for want of memory, or with its node; no rank left a word"
        return Ending("killed", f"killed {after}, {told}: see {_output(starts)} ({owner})")
    return Ending("ended", f"ended {after}") if starts or step else Ending("new", "not started")


def _in_order(end: dict[str, Any]) -> Ending:
    steps = f"step {_count(end.get('step'))} of {_count(end.get('steps'))}"
    if end.get("finished"):
        return Ending("finished", f"finished: {steps}")
    then = "its job is to run again" if end.get("requeued") else "to go on, run it again"
    return Ending("stopped", f"stopped after {steps}: {end.get('reason')}; {then}")


def _held(directory: Path) -> tuple[str, bool] | None:
    """Who has the lock of the directory, and whether that process may live; None if nobody has it."""
    path = directory / lock.NAME
    try:
        owner, silent = Owner.parse(path.read_bytes()[: 1 << 16]), time.time() - path.stat().st_mtime
    except OSError:
        return None
    who = str(owner or "a run that does not say who it is")
    with suppress(OSError):  # of a directory that cannot be written in nobody knows
        try:
            lock.check(directory)
            return who, owner is not None and owner.is_me
        except InUseError:
            pass
    if silent > _SILENT and not (owner and owner.is_here):
        who += f"; no sign of life for {silent:.0f} s, so that it may have been killed"
    return who, True


def _output(starts: list[dict[str, Any]]) -> str:
    job = starts[-1].get("job") if starts else None
    known = isinstance(job, dict) and job.get("id")
    return f"the output of {job.get('scheduler')} job {job['id']}" if isinstance(job, dict) and known else "its output"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "?"
