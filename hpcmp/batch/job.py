"""The batch job that this process is in, by its environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

#: The schedulers that are known, and the variable by which each is told.
SCHEDULERS = {"Slurm": "SLURM_JOB_ID", "LSF": "LSB_JOBID", "PBS": "PBS_JOBID", "Flux": "FLUX_JOB_ID"}


class Job(NamedTuple):
    """A batch job: its scheduler ("" outside of any), id as its commands take it (of an array: the one task),
    cluster if it is Slurm's, and how often it was requeued where the scheduler tells (Slurm alone).

    array, task: the id of the array that it is of, and which of its tasks; "" if it is none. nodes: of the allocation;
    ranks: that were asked for; 0 where the environment does not say.
    """

    scheduler: str = ""
    id: str = ""
    cluster: str = ""
    restarts: int = 0
    array: str = ""
    task: str = ""
    nodes: int = 0
    ranks: int = 0

    def __str__(self) -> str:
        if not self.id:
            return "no batch job"
        parts = [f"{self.scheduler} job {self.id}"]
        parts += [f"task {self.task} of array {self.array}"] if self.array else []
        parts += [f"on {self.cluster}"] if self.cluster else []
        parts += [f"{self.nodes} node{'s' * (self.nodes != 1)}"] if self.nodes else []
        parts += [f"{self.ranks} rank{'s' * (self.ranks != 1)}"] if self.ranks else []
        parts += [f"requeued {self.restarts} time{'s' * (self.restarts != 1)}"] if self.restarts else []
        return ", ".join(parts)


def find_job(environ: Mapping[str, str] = os.environ) -> Job:
    """The batch job of this process. Asks nobody; a file that the scheduler names (PBS_NODEFILE) may be read."""
    finders = {"Slurm": _slurm, "LSF": _lsf, "PBS": _pbs, "Flux": _flux}
    for scheduler, variable in SCHEDULERS.items():
        if environ.get(variable):
            return finders[scheduler](environ)
    return Job()


def _slurm(environ: Mapping[str, str]) -> Job:
    array, task = environ.get("SLURM_ARRAY_JOB_ID", ""), environ.get("SLURM_ARRAY_TASK_ID", "")
    return Job(
        "Slurm",
        f"{array}_{task}" if array else environ["SLURM_JOB_ID"],  # one task has the id of the whole array
        environ.get("SLURM_CLUSTER_NAME", ""),
        number(environ.get("SLURM_RESTART_COUNT")) or 0,
        array,
        task,
        number(environ.get("SLURM_JOB_NUM_NODES")) or 0,
        number(environ.get("SLURM_NTASKS")) or 0,
    )


def _lsf(environ: Mapping[str, str]) -> Job:
    own, index = environ["LSB_JOBID"], environ.get("LSB_JOBINDEX", "0")
    in_array = index not in ("", "0")  # the jobs of an array share an id
    hosts = environ.get("LSB_MCPU_HOSTS", "").split()[::2]  # host and slots in turn
    slots = number(environ.get("LSB_DJOB_NUMPROC")) or 0
    nodes = len(set(hosts))
    if in_array:
        return Job("LSF", f"{own}[{index}]", array=own, task=index, nodes=nodes, ranks=slots)
    return Job("LSF", own, nodes=nodes, ranks=slots)


def _pbs(environ: Mapping[str, str]) -> Job:
    own, index = environ["PBS_JOBID"], environ.get("PBS_ARRAY_INDEX") or environ.get("PBS_ARRAYID", "")  # Torque's
    array = own.replace(f"[{index}]", "[]") if index else ""
    lines = _lines(environ.get("PBS_NODEFILE", ""))  # a line for each rank
    return Job("PBS", own, array=array, task=index, nodes=len(set(lines)), ranks=len(lines))


def _flux(environ: Mapping[str, str]) -> Job:
    nodes, ranks = number(environ.get("FLUX_JOB_NNODES")), number(environ.get("FLUX_JOB_SIZE"))
    return Job("Flux", environ["FLUX_JOB_ID"], task=environ.get("FLUX_JOB_CC", ""), nodes=nodes or 0, ranks=ranks or 0)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").split() if path else []
    except OSError:
        return []


def number(text: str | None) -> int | None:
    """A text of decimal digits as a number; None for any other."""
    return int(text) if text and text.isascii() and text.isdigit() else None


def switches_above(environ: Mapping[str, str]) -> str:
    """The switches above this node, from SLURM_TOPOLOGY_ADDR (``core.leaf3.node17``, where Slurm knows the network)."""
    pattern = environ.get("SLURM_TOPOLOGY_ADDR_PATTERN", "").split(".")
    address = environ.get("SLURM_TOPOLOGY_ADDR", "").split(".")
    if len(pattern) != len(address):
        return ""
    return ".".join(name for kind, name in zip(pattern, address, strict=True) if kind == "switch")
