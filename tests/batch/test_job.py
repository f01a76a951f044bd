"""Which job a process is in, by the variables that schedulers set."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcmp.batch import Job, find_job

SLURM = {
    "SLURM_JOB_ID": "4713",
    "SLURM_CLUSTER_NAME": "alps",
    "SLURM_RESTART_COUNT": "2",
    "SLURM_ARRAY_JOB_ID": "4711",
    "SLURM_ARRAY_TASK_ID": "2",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_NTASKS": "32",
    "SLURM_PROCID": "0",
}


@pytest.mark.parametrize(
    ("environ", "job"),
    [
        ({}, Job()),
        ({"SLURM_JOB_ID": ""}, Job()),
        (SLURM, Job("Slurm", "4711_2", "alps", 2, "4711", "2", 4, 32)),
        (SLURM | {"SLURM_JOB_ID": "4711"}, Job("Slurm", "4711_2", "alps", 2, "4711", "2", 4, 32)),
        ({"SLURM_JOB_ID": "7"}, Job("Slurm", "7")),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "x"}, Job("Slurm", "7")),
        ({"PBS_JOBID": "12.server"}, Job("PBS", "12.server")),
        (
            {"PBS_JOBID": "12[3].server", "PBS_ARRAY_INDEX": "3"},
            Job("PBS", "12[3].server", array="12[].server", task="3"),
        ),
        (
            {"PBS_JOBID": "12[3].server", "PBS_ARRAYID": "3"},
            Job("PBS", "12[3].server", array="12[].server", task="3"),
        ),
        ({"PBS_JOBID": "12.server", "PBS_NODEFILE": "/nowhere"}, Job("PBS", "12.server")),
        ({"LSB_JOBID": "7", "LSB_JOBINDEX": "3"}, Job("LSF", "7[3]", array="7", task="3")),
        ({"LSB_JOBID": "7", "LSB_JOBINDEX": "0"}, Job("LSF", "7")),
        (
            {"LSB_JOBID": "7", "LSB_MCPU_HOSTS": "batch1 1 h2 42 h3 42", "LSB_DJOB_NUMPROC": "85"},
            Job("LSF", "7", nodes=3, ranks=85),
        ),
        ({"FLUX_JOB_ID": "ƒ2Ab", "FLUX_JOB_NNODES": "2", "FLUX_JOB_SIZE": "8"}, Job("Flux", "ƒ2Ab", nodes=2, ranks=8)),
    ],
)
def test_a_job_is_known_by_its_variables(environ: dict[str, str], job: Job) -> None:
    assert find_job(environ) == job


def test_pbs_names_its_ranks_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("n1\nn1\nn1\nn2\n")
    job = find_job({"PBS_JOBID": "12", "PBS_NODEFILE": str(tmp_path / "nodes")})
    assert (job.nodes, job.ranks) == (2, 4)


def test_a_job_is_told_in_a_line() -> None:
    told = "Slurm job 4711_2, task 2 of array 4711, on alps, 4 nodes, 32 ranks, requeued 2 times"
    assert str(find_job(SLURM)) == told
    assert str(Job("PBS", "12", restarts=1, nodes=1, ranks=1)) == "PBS job 12, 1 node, 1 rank, requeued 1 time"
    assert str(Job()) == "no batch job"
