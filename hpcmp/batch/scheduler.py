"""What the scheduler says of a job when it is asked: how long it still has, and whether it has ended."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime

from .job import Job, number

log = logging.getLogger("hpcmp")

#: Slurm's states of a job of which nothing runs any more. Not NODE_FAIL: a node that does not answer may still compute.
_ENDED = frozenset("CANCELLED COMPLETED DEADLINE FAILED OUT_OF_MEMORY PREEMPTED TIMEOUT".split())
_ASKING = 10.0  # seconds that the scheduler has for its answer


def time_left(job: Job, environ: Mapping[str, str] = os.environ) -> float | None:
    """``ask_time_left``, and None where nobody knows: a scheduler that gives no answer is logged as a warning."""
    try:
        return ask_time_left(job, environ)
    except ValueError as error:
        log.warning("the time that is left to the job is unknown: %s", error)
        return None


def ask_time_left(job: Job, environ: Mapping[str, str] = os.environ) -> float | None:
    """The seconds until the scheduler ends ``job``, which is this process's; None if there is no limit.

    From the environment where it says (SLURM_JOB_END_TIME), else the scheduler is asked, for 10 s at most: call it on
    one rank, once. Raises ValueError, which names the command, if it gives no answer.
    """
    if (end := number(environ.get("SLURM_JOB_END_TIME"))) and job.scheduler == "Slurm":
        return max(0.0, end - time.time())
    if job.scheduler not in _QUESTIONS:
        return None
    question, read = _QUESTIONS[job.scheduler]
    command = [*question, job.id]
    try:
        return read(answer(command))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise ValueError(f"`{' '.join(command)}`: {error}") from None


def has_ended(job: Job) -> bool:
    """Whether Slurm knows that a job of this cluster has ended, or has forgotten it, minutes after its end; False for
    another scheduler's, and where nobody knows."""
    if job.scheduler != "Slurm" or not re.fullmatch(r"\d+(_\d+)?", job.id, re.ASCII):
        return False
    try:
        states = answer(["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job.id}"]).split()
    except ValueError as error:
        return "Invalid job id" in str(error)
    except (OSError, subprocess.SubprocessError):
        return False
    return bool(states) and _ENDED.issuperset(states)


def answer(command: Sequence[str]) -> str:
    """What ``command`` writes to stdout. Raises OSError if it cannot be run, TimeoutExpired after 10 s, and ValueError
    if it fails, with what it says."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", timeout=_ASKING
    )
    if done.returncode:
        raise ValueError(" ".join(done.stderr.split()) or f"exit code {done.returncode}")
    return done.stdout


def slurm_left(text: str) -> float | None:
    """Seconds from squeue's %L: ``1-02:03:04``, ``2:03:04`` or ``59:12``; None for UNLIMITED and NOT_SET.

    Raises ValueError for another text: INVALID is what squeue writes once the limit has passed, and above a year.
    """
    word = text.strip()
    if word in ("UNLIMITED", "NOT_SET"):
        return None
    return _clock(word, r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")


def pbs_left(text: str) -> float | None:
    """Seconds from ``qstat -f``: the walltime asked for less what is used; None if none was asked for.

    The server learns what is used every few minutes; so it is also reckoned from ``stime``, the job's start by the
    server's local time, if that makes sense, and the more of both counts. Raises ValueError for another text.
    """
    lines = re.sub(r"\n\t", "", text).splitlines()  # a long value goes on after a tab
    values = dict(line.strip().split(" = ", 1) for line in lines if " = " in line)
    if not any(line.startswith("Job Id:") for line in lines):
        raise ValueError(f"no job in {text[:80]!r}")
    if (walltime := values.get("Resource_List.walltime")) is None:
        return None
    pattern = r"()(\d+):(\d+):(\d+)"
    limit, used = _clock(walltime, pattern), _clock(values.get("resources_used.walltime", "00:00:00"), pattern)
    with suppress(ValueError):
        since = time.time() - datetime.strptime(values.get("stime", ""), "%a %b %d %H:%M:%S %Y").timestamp()
        used = max(used, since) if since <= limit else used
    return max(0.0, limit - used)


def lsf_left(text: str) -> float | None:
    """Seconds from ``bjobs -o time_left``, ``1:12 L`` in hours and minutes; None for ``-``, and for ``E`` and ``X``, an
    estimate, which ends no job. Raises ValueError for another text."""
    word, _, kind = text.strip().partition(" ")
    if word == "-" or kind in ("E", "X"):
        return None
    return _clock(f"{word}:00", r"()(\d+):(\d+):(\d+)")


def flux_left(text: str) -> float | None:
    """Seconds from ``flux job timeleft``; None for 2^32 - 1 and above, which is how it writes that there is no limit.

    Raises ValueError for another text.
    """
    seconds = float(text)
    return seconds if seconds < 2**32 - 1 else None


def _clock(text: str, pattern: str) -> float:
    """Days, hours, minutes and seconds as ``pattern`` finds them, in seconds."""
    match = re.fullmatch(pattern, text)
    if match is None:
        raise ValueError(f"no time: {text[:80]!r}")
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


_QUESTIONS: dict[str, tuple[tuple[str, ...], Callable[[str], float | None]]] = {
    "Slurm": (("squeue", "--noheader", "--format=%L", "--jobs"), slurm_left),
    "PBS": (("qstat", "-f"), pbs_left),
    "LSF": (("bjobs", "-noheader", "-o", "time_left"), lsf_left),
    "Flux": (("flux", "job", "timeleft"), flux_left),
}
