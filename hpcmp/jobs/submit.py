"""Writing a script and handing it to its scheduler."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence

from ..errors import InputError
from .job import Job
from .schedulers import DIALECTS
from .script import HEADER, script


def write(job: Job) -> None:
    """Write the script of ``job`` to its path, executable. Raises InputError if it cannot be, or if there is a file
    that is no script of ours."""
    try:
        if os.path.exists(job.path):
            with open(job.path, encoding="utf-8", errors="replace") as file:
                if HEADER not in file.read():
                    raise InputError(f"--out {job.path}: there is a file that `hpcmp job` has not written")
        with open(job.path, "w", encoding="utf-8") as file:
            file.write(script(job))
        os.chmod(job.path, os.stat(job.path).st_mode | 0o111)
    except OSError as error:
        raise InputError(f"--out {job.path}: {error.strerror}") from None


def submit(job: Job, count: int = 1) -> list[str]:
    """Submit the script of ``job``, which is written, ``count`` times, each after the end of the one before; the ids.

    An array is one submission; where the scheduler has none (Flux), one for each run. Raises InputError with what the
    scheduler says against it, and the ids that it has accepted.
    """
    alone = job.scheduler == "flux" and len(job.members) > 1
    ids: list[str] = []
    for run in [[str(n)] for n in range(1, len(job.members) + 1)] if alone else [[]]:
        previous = None
        for _ in range(count):
            try:
                previous = _submit(job, previous, run)
            except InputError as error:
                raise InputError(f"{error}; submitted: {', '.join(ids)}" if ids else str(error)) from None
            ids.append(previous)
    return ids


def _submit(job: Job, after: str | None, run: Sequence[str]) -> str:
    """Submit the script once; its id."""
    dialect = DIALECTS[job.scheduler]
    words = [*dialect.submit, *(word.format(after) for word in dialect.dependency if after)]
    given = os.devnull if job.scheduler != "lsf" else job.path
    words += [] if job.scheduler == "lsf" else [job.path, *run]
    try:
        with open(given) as stdin:
            done = subprocess.run(words, stdin=stdin, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise InputError(f"--submit: there is no {words[0]} on PATH; the script is {job.path}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"--submit: {words[0]}: {error}") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise InputError(f"--submit: {words[0]} ended with {done.returncode}: {said or 'it says nothing'}")
    return _id(job.scheduler, done.stdout)


def _id(scheduler: str, text: str) -> str:
    """The id in what the scheduler prints."""
    last = text.strip().splitlines()[-1].strip() if text.strip() else ""
    if scheduler == "slurm":
        return last.partition(";")[0]  # a cluster may follow
    if scheduler == "lsf" and (found := re.search(r"Job <(\d+)>", text)):
        return found[1]
    return last
