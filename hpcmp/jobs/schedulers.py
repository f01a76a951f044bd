"""What each scheduler wants to be told, and where a job finds what it has: the parts of a script that differ."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from .job import Job


@dataclass(frozen=True)
class Dialect:
    """A scheduler's part of a script.

    prefix: what begins a directive. directives: those of a job. start: bash that the script begins with. nodes: a
    command that lists the nodes of the job. cores: an expression for the cores it has on this one. index: the
    expression for the number of an array's run. again, anew: bash that has the job run again, under its id, or one that
    may not be; ARRAY stands for the run of an array, SCRIPT for the path. submit, dependency: the words that submit a
    script, and those that have it wait for the end of job {}.
    """

    prefix: str
    directives: Callable[[Job], list[str]]
    nodes: str
    cores: str
    index: str
    again: str
    anew: str
    submit: tuple[str, ...]
    dependency: tuple[str, ...]
    start: str = ""


def _word(text: str) -> str:
    """A site's value as one word of a directive, which few schedulers can quote."""
    return text if re.fullmatch(r"[\w.,:=+@%/-]+", text, re.ASCII) else shlex.quote(text)


def _clock(seconds: int) -> str:
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _slurm(job: Job) -> list[str]:
    batch, node = job.site.batch, job.site.node
    array = len(job.members) > 1
    return [
        f"--job-name={job.name}",
        *([f"--array=1-{len(job.members)}"] if array else []),
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.ranks_per_node}",
        *([f"--cpus-per-task={job.threads}"] if job.threads else []),
        *([f"--gpus-per-node={node.gpus}"] if node.gpus else []),
        *([f"--time={_clock(job.seconds)}"] if job.seconds else []),
        *([f"--account={_word(batch.account)}"] if batch.account else []),
        *([f"--partition={_word(batch.queue)}"] if batch.queue else []),
        f"--output={job.name}-{'%A_%a' if array else '%j'}.out",
        "--open-mode=append",
        f"--signal=B:USR1@{batch.warning}",
        "--requeue" if batch.requeue and job.requeues else "--no-requeue",
    ]


def _pbs(job: Job) -> list[str]:
    batch, node = job.site.batch, job.site.node
    array = len(job.members) > 1
    chunk = [f"ncpus={node.cores or job.ranks_per_node}", f"mpiprocs={job.ranks_per_node}"]
    chunk += [f"ngpus={node.gpus}"] if node.gpus else []
    chunk += [_word(batch.chunk)] if batch.chunk else []
    return [
        f"-N {job.name[:15]}",
        "-S /bin/bash",  # else the shell of whoever submits it reads the script
        *([f"-J 1-{len(job.members)}"] if array else []),
        f"-l select={job.nodes}:{':'.join(chunk)}",
        *([] if "place=" in batch.options else ["-l place=scatter"]),
        f"-l walltime={_clock(job.seconds or 0)}",
        *([f"-A {_word(batch.account)}"] if batch.account else []),
        *([f"-q {_word(batch.queue)}"] if batch.queue else []),
        "-j oe",
        "-k oed",
        "-r y" if array or batch.requeue and job.requeues else "-r n",  # PBS takes no array with n
    ]


def _lsf(job: Job) -> list[str]:
    batch, node = job.site.batch, job.site.node
    array = len(job.members) > 1
    return [
        f'-J "{job.name}[1-{len(job.members)}]"' if array else f"-J {job.name}",
        f"-n {job.nodes * job.ranks_per_node}",
        f'-R "span[ptile={job.ranks_per_node}]"',
        *([f'-gpu "num={node.gpus}"'] if node.gpus else []),
        f"-W {math.ceil((job.seconds or 0) / 60)}",
        *([f"-P {_word(batch.account)}"] if batch.account else []),
        *([f"-q {_word(batch.queue)}"] if batch.queue else []),
        f"-o {job.name}-%J{'_%I' if array else ''}.out",
        f"-wa USR1 -wt {math.ceil(batch.warning / 60)}",
        *(['-r -Q "75"'] if batch.requeue and job.requeues else []),
    ]


def _flux(job: Job) -> list[str]:
    batch = job.site.batch
    return [
        f"--job-name={job.name}",
        f"--nodes={job.nodes} --exclusive",
        f"--time-limit={job.seconds}s",
        *([f"--bank={_word(batch.account)}"] if batch.account else []),
        *([f"--queue={_word(batch.queue)}"] if batch.queue else []),
        f"--output={job.name}-{{{{id}}}}.out",
    ]


#: A job that is cancelled is COMPLETING while its ranks save; of one about which squeue has no answer it is not known.
_RUNNING = 'case $(squeue -h -j "$SLURM_JOB_ID" -o %T) in RUNNING | "") ;; *) exit 75 ;; esac\n'

DIALECTS = {
    "slurm": Dialect(
        "#SBATCH",
        _slurm,
        nodes='scontrol show hostnames "$SLURM_JOB_NODELIST"',
        cores="SLURM_CPUS_ON_NODE",
        index="${SLURM_ARRAY_TASK_ID:-}",
        again=_RUNNING + 'trap "" TERM   # requeueing ends this script\n'
        'scontrol requeue "$SLURM_JOB_ID" || sbatch ARRAY"$0"',
        anew=_RUNNING + 'sbatch ARRAY"$0"',
        submit=("sbatch", "--parsable"),
        dependency=("--dependency=afterany:{}",),
    ),
    "pbs": Dialect(
        "#PBS",
        _pbs,
        nodes='sort -u "$PBS_NODEFILE"',
        cores="${NCPUS:-$(env -u OMP_NUM_THREADS nproc)}",
        index="${PBS_ARRAY_INDEX:-}",
        again='trap "" TERM   # requeueing ends this script\nqrerun "$PBS_JOBID" || qsub ARRAYSCRIPT',
        anew="qsub ARRAYSCRIPT",
        submit=("qsub",),
        dependency=("-W", "depend=afterany:{}"),
        start='cd "$PBS_O_WORKDIR" || exit 2\n',
    ),
    "lsf": Dialect(
        "#BSUB",
        _lsf,
        nodes='sort -u "$LSB_DJOB_HOSTFILE"',
        cores="$(env -u OMP_NUM_THREADS nproc)",
        index="${LSB_JOBINDEX:-}",
        again=": # LSF requeues a job that ends with 75 (#BSUB -Q)",
        anew="bsub ARRAY<SCRIPT",
        submit=("bsub",),
        dependency=("-w", "ended({})"),
    ),
    "flux": Dialect(
        "# flux:",
        _flux,
        nodes='seq "$(flux resource list --states=up -no "{nnodes}")"',
        cores="$(env -u OMP_NUM_THREADS nproc)",
        index="${1:-}",
        again='flux --parent batch "$0"ARRAY',
        anew='flux --parent batch "$0"ARRAY',
        submit=("flux", "batch"),
        dependency=("--dependency=afterany:{}",),
    ),
}
