"""Nodes that fail while jobs run on them."""

from __future__ import annotations

import re

import pytest

from .jobs import SLURMBOX, Cluster, Job, command

pytestmark = pytest.mark.timeout(240)


def test_the_nodes_that_are_left_go_on(failed: dict[str, Job], unlimited: Job, told: list[str]) -> None:
    job = failed["last"]
    assert job.wait(150) == "COMPLETED", job.output
    before, after = job.attempts
    assert [lines[0]["ranks"] for lines in (before, after)] == [6, 4]
    assert job.facts()["Restarts"] == "0"
    assert job.losses == pytest.approx(unlimited.losses, rel=1e-5)
    told.append(f"node 3 of 3 fails, the other two go on: {job.cost}")


def test_a_job_whose_first_node_fails_is_requeued(failed: dict[str, Job], unlimited: Job, told: list[str]) -> None:
    job = failed["first"]
    assert job.wait(150) == "COMPLETED", job.output
    assert job.facts()["Restarts"] == "1"
    assert "node1" not in {line["host"] for line in job.attempts[1]}
    assert job.losses == unlimited.losses
    told.append(f"node 1 of 2 fails, where the job's script ran: {job.cost}")


@pytest.fixture(scope="module")
def struck(cluster: Cluster) -> dict[str, Job]:
    """Two jobs whose rank 3 got a signal at step 12 or later: with STOP it answers nobody, with KILL it ends as it does
    for want of memory."""
    jobs = {signal: cluster.job(signal, pace=0.3, overrides=["train.watchdog=8"]) for signal in ("STOP", "KILL")}
    for signal, job in jobs.items():
        job.at_step(12)
        rank = job.journal(3)[-1]
        command(SLURMBOX, "exec", rank["host"], "kill", f"-{signal}", str(rank["pid"]))
    return jobs


@pytest.mark.parametrize("signal", ["STOP", "KILL"])
def test_a_rank_that_is_lost_ends_the_others_and_the_job_goes_on_once_more(
    struck: dict[str, Job], unlimited: Job, told: list[str], signal: str
) -> None:
    job = struck[signal]
    assert job.wait() == "COMPLETED", job.output
    assert len(job.attempts) == 2 and job.facts()["Restarts"] == "0"
    assert job.losses == unlimited.losses
    told.append(f"rank 3 gets SIG{signal}, train.watchdog = 8: {job.cost}")


def test_a_rank_that_hangs_is_named(struck: dict[str, Job]) -> None:
    struck["STOP"].wait()
    host = struck["STOP"].journal(3)[0]["host"]
    assert re.search(rf"hpcmp: rank 3 .*on {host}\b.* left no dump", struck["STOP"].output), struck["STOP"].output
