"""Which of how many processes this one is, by the variables that launchers set."""

from __future__ import annotations

import pytest

from hpcmp.batch import Launcher, launcher

from .launchers import FLUX, HYDRA, JSRUN, OPEN_MPI, PALS, SRUN

#: What every rank has under Open MPI's mpirun in a job of Slurm: that of the batch script, or of mpirun's daemon.
IN_SLURM = SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "1"}


@pytest.mark.parametrize(
    ("job", "found"),
    [
        ({}, None),
        (OPEN_MPI, Launcher("Open MPI", 3, 8, 1, 4)),
        (HYDRA, Launcher("MPICH Hydra", 1, 2, 0, 1)),
        (SRUN, Launcher("srun", 5, 7, 1, 3)),
        (SRUN | {"SLURM_NODEID": "0"}, Launcher("srun", 5, 7, 1, 4)),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "1,3(x2)", "SLURM_NODEID": "2"}, Launcher("srun", 5, 7, 1, 3)),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "rubbish"}, Launcher("srun", 5, 7, 1, None)),
        (PALS, Launcher("PALS", 9, 16, 1, 8)),
        (JSRUN, Launcher("jsrun", 2, 12, 2, 6)),
        (FLUX, Launcher("Flux", 4, 6, 0, None)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Launcher("a PMI launcher", 1, 2)),
        (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "7"}, Launcher("srun", 5, 7, 1, 3)),  # srun --mpi=pmi2
        (IN_SLURM | OPEN_MPI, Launcher("Open MPI", 3, 8, 1, 4)),
        (SRUN | OPEN_MPI, Launcher("Open MPI", 3, 8, 1, 4)),  # mpirun's daemon on a node is a task of srun
        (SRUN | HYDRA, Launcher("MPICH Hydra", 1, 2, 0, 1)),
        ({k: v for k, v in SRUN.items() if k != "SLURM_STEP_ID"}, None),  # a batch script
        ({"OMPI_COMM_WORLD_RANK": "x", "OMPI_COMM_WORLD_SIZE": "2"}, None),
    ],
)
def test_the_launcher_is_read_from_its_variables(job: dict[str, str], found: Launcher | None) -> None:
    assert launcher(job) == found
