"""Having the job run again: the scheduler's own command, or one that the job script names."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence

from .job import Job
from .scheduler import answer

#: The variable with a command line of the shell that submits the job again, in place of the scheduler's own way.
RESUBMIT = "HPCMP_RESUBMIT"

_COMMANDS = {"Slurm": ("scontrol", "requeue"), "PBS": ("qrerun",), "LSF": ("brequeue",)}


def requeue_command(job: Job, environ: Mapping[str, str] = os.environ) -> list[str] | None:
    """The command that has ``job`` run again: HPCMP_RESUBMIT if it is set, else the scheduler's own, which keeps the
    job's id; None where there is neither (Flux has none, and a plain mpirun)."""
    if line := environ.get(RESUBMIT, "").strip():
        return ["sh", "-c", line]
    command = _COMMANDS.get(job.scheduler)
    return [*command, job.id] if command else None


def requeue(command: Sequence[str]) -> str | None:
    """Run what ``requeue_command`` gave, on one rank, as the last thing it does: a scheduler ends the job at once.

    Returns None once it is accepted, else what went wrong, in a line.
    """
    try:
        answer(command)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"`{command[-1] if command[0] == 'sh' else shlex.join(command)}`: {error}"
    return None
