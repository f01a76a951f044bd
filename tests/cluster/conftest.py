"""The fixtures of the tests on a Slurm. Without one there are none to run: `bash tests/cluster/run.sh` starts one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.corpus import corpus

from .jobs import SLURMBOX, Cluster, Job, command

collect_ignore_glob = [] if "SLURMBOX" in os.environ else ["test_*.py"]
EVENTS: list[str] = []


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster, with a corpus."""
    folder = tmp_path_factory.mktemp("cluster")
    cluster = Cluster(folder, corpus(folder))
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def failed(cluster: Cluster) -> dict[str, Job]:
    """Two jobs on nodes that failed at step 12 or later: ``first`` had the node where its script ran, and one more;
    ``last`` three nodes, of which the last failed. Of step 10 there is a checkpoint."""
    jobs = {
        "first": cluster.job("first", pace=0.5),  # gets nodes 1 and 2: asked for, they would be asked for ever after
        "last": cluster.job("last", "--nodelist=node[2-4]", pace=0.5, nodes=3),
    }
    for job in jobs.values():
        job.at_step(12)
    assert jobs["first"].journal()[0]["host"] == "node1"
    for node in "node1", "node4":
        command(SLURMBOX, "fail", node)
    cluster.options = "--exclude=node1,node4"
    return jobs


@pytest.fixture(scope="session")
def limited(cluster: Cluster) -> Job:
    """A job with a minute, whose steps would take longer."""
    return cluster.job("limited", "--nodelist=node[2-3]", minutes=1, pace=0.7, overrides=["train.margin=5"])


@pytest.fixture(scope="session", autouse=True)
def early(failed: dict[str, Job], limited: Job) -> None:
    """The jobs that take long are submitted before all others, which run beside them."""


@pytest.fixture(scope="session")
def unlimited(cluster: Cluster) -> Job:
    """The same run as all the others, and nothing happens to it."""
    job = cluster.job("unlimited")
    assert job.wait() == "COMPLETED", job.output
    return job


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What a test has to say of the time that an event cost: lines of the summary."""
    lines: list[str] = []
    yield lines
    EVENTS.extend(lines)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if EVENTS:
        terminalreporter.section("time lost")
        for line in EVENTS:
            terminalreporter.write_line(line)
