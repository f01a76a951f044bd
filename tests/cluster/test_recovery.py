"""A rank that dies on another node: the others go on in their processes (``train.recover``), in the same job."""

from __future__ import annotations

import pytest

from .jobs import SLURMBOX, Cluster, Job, command

pytestmark = pytest.mark.timeout(240)


def test_the_ranks_that_are_left_go_on_in_their_processes(cluster: Cluster, unlimited: Job, told: list[str]) -> None:
    job = cluster.job("recovering", launcher="mpirun", pace=0.3, overrides=["train.recover=true"])
    job.at_step(12)
    rank = job.journal(3)[-1]
    command(SLURMBOX, "exec", rank["host"], "kill", "-KILL", str(rank["pid"]))
    assert job.wait() == "COMPLETED", job.output
    assert job.facts()["Restarts"] == "0" and len(job.attempts) == 1
    before, after = ([line for line in job.journal() if line["ranks"] == ranks] for ranks in (4, 2))
    done = before[-1]["step"] + 1
    assert after[0]["step"] in (done // 10 * 10, done // 10 * 10 - 10), "the last checkpoint, or that before it, torn"
    assert after[0]["step"] >= 10 and after[-1]["step"] == 59
    assert job.losses == pytest.approx(unlimited.losses, rel=1e-5)
    seconds, again = after[0]["time"] - before[-1]["time"], before[-1]["step"] + 1 - after[0]["step"]
    told.append(f"rank 3 gets SIGKILL, train.recover: no step for {seconds:.1f} s, {again} steps again")
