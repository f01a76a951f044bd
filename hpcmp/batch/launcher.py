"""What launched this process as one of many, by its environment: without a message, before MPI starts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .job import number


@dataclass(frozen=True)
class Launcher:
    """What started this process as one of ``size``; on its host it is ``local_rank`` of ``local_size``, where known."""

    name: str
    rank: int
    size: int
    local_rank: int | None = None
    local_size: int | None = None

    @property
    def ends_job(self) -> bool:
        """Whether the first process that exits with an error is the end of the others, MPI or no MPI."""
        return self.name == "Open MPI"

    @property
    def awaits_all(self) -> bool:
        """Whether processes wait in MPI_Init for ever for one that has ended before it, whatever its exit code."""
        return self.name == "MPICH Hydra"


# The variables for rank, size, local rank and local size, and one more that must be set. The order matters: a launcher
# that runs inside another's job step inherits the other's variables, and several set PMI_RANK.
_LAUNCHERS = (
    (
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "",
    ),
    ("MPICH Hydra", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    (
        "MVAPICH mpirun_rsh",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
        "",
    ),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "", "SLURM_STEP_ID"),
    ("PALS", "PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE", ""),
    ("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE", ""),
    ("Flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", "", ""),
    ("a PMI launcher", "PMI_RANK", "PMI_SIZE", "", "", ""),
)


def launcher(environ: Mapping[str, str] = os.environ) -> Launcher | None:
    """The launcher of this process by its environment, or None for a process that was started alone."""
    for name, rank, size, local_rank, local_size, mark in _LAUNCHERS:
        numbers = [number(environ.get(variable)) for variable in (rank, size, local_rank, local_size)]
        if numbers[0] is None or numbers[1] is None or (mark and mark not in environ):
            continue
        if name == "srun":
            numbers[3] = _srun_local_size(environ)
        return Launcher(name, numbers[0], numbers[1], numbers[2], numbers[3])
    return None


def _srun_local_size(environ: Mapping[str, str]) -> int | None:
    """This node's entry of SLURM_STEP_TASKS_PER_NODE, such as ``4(x2),3``: two nodes with 4 tasks, then one with 3."""
    tasks: list[int] = []
    for item in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        tasks += [int(match[1])] * int(match[2] or 1) if match else []
    node = number(environ.get("SLURM_NODEID"))
    return tasks[node] if node is not None and node < len(tasks) else None
