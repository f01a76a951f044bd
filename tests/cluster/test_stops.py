"""Jobs that are asked to stop, by Slurm's limit or by a person: nothing is lost, and the losses are the same bits."""

from __future__ import annotations

import time

import pytest

from .jobs import Cluster, Job, command

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def signalled(cluster: Cluster) -> dict[str, tuple[Job, float]]:
    """A job for each signal, and when it was sent."""
    jobs = {signal: cluster.job(signal, pace=0.3) for signal in ("USR1", "TERM")}
    sent = {}
    for signal, job in jobs.items():
        job.at_step(12)
        sent[signal] = job, time.time()
        command("scancel", f"--signal={signal}", job.id)
    return sent


@pytest.mark.parametrize("signal", ["USR1", "TERM"])
def test_a_signal_saves_and_the_job_goes_on(
    signalled: dict[str, tuple[Job, float]], unlimited: Job, told: list[str], signal: str
) -> None:
    job, sent = signalled[signal]
    assert job.wait() == "COMPLETED", job.output
    assert f"received SIG{signal}" in job.output
    assert job.losses == unlimited.losses
    assert len(job.attempts) == 2 and job.repeated == 0
    told.append(f"scancel --signal={signal}: last step {job.attempts[0][-1]['time'] - sent:.1f} s later; {job.cost}")


def test_a_job_that_is_cancelled_has_saved_its_last_step_and_the_next_of_the_chain_goes_on(
    cluster: Cluster, unlimited: Job, told: list[str]
) -> None:
    folder = cluster.run("chain")
    first, second, third = (Job(folder, i) for i in cluster.write(folder, "--submit", "--chain=3", pace=0.3)["ids"])
    first.at_step(12)
    command("scancel", first.id)
    assert second.wait() == "COMPLETED", second.output
    assert first.state == "CANCELLED"
    assert second.losses == unlimited.losses
    assert len(second.attempts) == 2 and second.repeated == 0
    told.append(f"scancel, next job of the chain: {second.cost}")
    assert third.wait() == "COMPLETED", third.output
    assert third.losses == unlimited.losses, "a job that comes after the end of the run changes nothing"


def test_a_run_of_an_array_goes_on_alone(cluster: Cluster, unlimited: Job) -> None:
    """One of them has the id by which Slurm means the whole array."""
    folder = cluster.run("array")
    whole = cluster.write(folder, "--submit", "--array=train.seed=0,1", pace=0.3)["ids"][0]
    jobs = [Job(folder, f"{whole}_{i}", f"run/{i}-train.seed={seed}") for i, seed in ((1, 0), (2, 1))]
    for job in jobs:
        job.at_step(12)
    told = next(job for job in jobs if job.facts()["JobId"] == whole)
    command("scancel", "--signal=USR1", told.id)
    assert [job.wait() for job in jobs] == ["COMPLETED"] * 2, jobs[0].output + jobs[1].output
    assert [job.facts()["Restarts"] for job in jobs] == [str(int(job is told)) for job in jobs]
    assert [len(job.attempts) for job in jobs] == [1 + (job is told) for job in jobs] and told.repeated == 0
    assert jobs[0].losses == unlimited.losses
    assert jobs[1].losses != unlimited.losses


def test_a_job_saves_before_its_limit_and_is_requeued(limited: Job, unlimited: Job, told: list[str]) -> None:
    assert limited.wait(150) == "COMPLETED", limited.output
    assert limited.losses == unlimited.losses
    assert len(limited.attempts) == 1 + int(limited.facts()["Restarts"]) >= 2  # more where cores are busy
    assert limited.repeated == 0
    told.append(f"time limit: {limited.cost}")
