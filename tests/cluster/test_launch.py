"""How ranks are started in an allocation: whichever way, the losses are those of the serial run."""

from __future__ import annotations

import sys

import pytest

from .jobs import Cluster, Job, command

pytestmark = pytest.mark.timeout(180)


def test_srun_has_the_losses_of_the_serial_run(cluster: Cluster, unlimited: Job) -> None:
    folder = cluster.run("serial")
    words = sys.executable, "-m", "tests.cluster.paced", "train", "run.toml", "layout.tp=1"
    done = command(*words, env=cluster.environment(0), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "2 nodes of 2 ranks: tp within a node; dp over 2" in unlimited.output
    assert unlimited.losses == pytest.approx(Job(folder, "").losses, rel=1e-5)


def test_mpirun_has_the_bits_of_srun(cluster: Cluster, unlimited: Job) -> None:
    job = cluster.job("mpirun", launcher="mpirun")
    assert job.wait() == "COMPLETED", job.output
    assert job.losses == unlimited.losses


def test_srun_without_mpi_is_refused_in_one_line_a_host(cluster: Cluster) -> None:
    """Each of the four processes would be a run of its own, in the same directory."""
    job = cluster.job("alone", mpi="none")
    assert job.wait() == "FAILED"
    assert job.code == 2
    said = [line for line in job.output.splitlines() if "hpcmp: error" in line]
    assert len(said) == 2, job.output
    assert all("srun started 4 processes, and MPI sees 4 jobs of 1 rank" in line for line in said)
    assert not (job.folder / "run").exists()
