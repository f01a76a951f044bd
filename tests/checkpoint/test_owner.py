"""Whose a lock is: batch jobs, processes whose number is used again, and what a scheduler knows."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest

from hpcmp.batch import Job, scheduler
from hpcmp.checkpoint import Lock, lock, owner
from hpcmp.checkpoint.owner import Owner, this_process
from hpcmp.errors import InUseError
from tests.checkpoint.locks import assert_taken, elsewhere, forge, neighbour

GOOD = this_process().render()


def test_a_number_that_is_used_again(tmp_path, caplog):
    forge(tmp_path, pid=os.getppid(), start=owner._stat(os.getppid())[1] - 1)
    with Lock(tmp_path):
        assert_taken(tmp_path)
    assert "its number is another's now" in caplog.text
    neighbour(tmp_path)
    with pytest.raises(InUseError):
        Lock(tmp_path).take()


def test_a_process_of_this_machine_lives_however_long_it_is_silent(tmp_path):
    os.utime(neighbour(tmp_path), (0, 0))
    with pytest.raises(InUseError):
        Lock(tmp_path).take()


@pytest.mark.parametrize(
    "job",
    [
        Job("Slurm", "7", "c", 2, "5", "2", 4, 32),
        Job("PBS", "12[3].server"),
        Job("LSF", "7[3]"),
        Job("Flux", "ƒ2Ab"),
        Job(),
    ],
)
def test_the_batch_job(job):
    made = dataclasses.replace(this_process(), job=job)
    assert Owner.parse(made.render()) == made
    assert (f"({job.scheduler} job {job.id})" in str(made)) == bool(job.id)
    for damaged in (job._replace(id=7), job._replace(nodes="4"), job._replace(restarts=-1)):
        assert Owner.parse(dataclasses.replace(made, job=damaged).render()) is None


def slurm(monkeypatch, restarts=0, cluster="alps"):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", cluster)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))


def test_a_requeued_job_takes_it_at_once(tmp_path, monkeypatch, caplog):
    elsewhere(tmp_path, job=Job("Slurm", "77", "alps", 0))
    slurm(monkeypatch)
    with pytest.raises(InUseError):  # another step of the same job
        lock.check(tmp_path)
    slurm(monkeypatch, restarts=1, cluster="rhine")
    with pytest.raises(InUseError):  # another job that happens to have this number
        lock.check(tmp_path)
    slurm(monkeypatch, restarts=1)
    with Lock(tmp_path):
        assert_taken(tmp_path)
    assert "its job has been requeued since" in caplog.text


@pytest.mark.parametrize(
    ("script", "dead"),
    [
        ("echo COMPLETED", True),
        ("echo FAILED; echo CANCELLED", True),
        ("echo RUNNING", False),
        ("echo COMPLETING", False),
        ("echo NODE_FAIL", False),
        ("echo COMPLETED; echo RUNNING", False),
        ("true", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", False),
        ("exec sleep 30", False),
    ],
)
def test_the_scheduler_is_asked(tmp_path, monkeypatch, script, dead):
    program = tmp_path / "bin" / "squeue"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(scheduler, "_ASKING", 0.5)
    slurm(monkeypatch)
    asked, theirs = tmp_path / "asked", elsewhere(tmp_path, job=Job("Slurm", "12", "alps"))
    if dead:
        lock.check(tmp_path)
    else:
        with pytest.raises(InUseError, match=r"\(Slurm job 12\)"):
            lock.check(tmp_path)
    assert "--jobs=12" in asked.read_text().split()
    asked.unlink()
    for job in (Job("Slurm", "12", "rhine"), Job("Slurm", "77", "alps"), Job("PBS", "12"), Job("Slurm", "1;x", "alps")):
        theirs = elsewhere(tmp_path, job=job)
        with pytest.raises(InUseError):
            lock.check(tmp_path)
    assert theirs.exists() and not asked.exists()


def spoiled(**changes: object) -> bytes:
    return json.dumps(json.loads(GOOD) | changes).encode()


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"[]", b"null", GOOD[:-9], b"\xff" * 99, b"[" * 9999, spoiled(pid=-1), spoiled(pid=2**31)]
    + [spoiled(pid=1.0), spoiled(pid=True), spoiled(start="7"), spoiled(user=7), spoiled(job=7), spoiled(more=7)]
    + [spoiled(job={"id": 7}), spoiled(job={"restarts": "7"})],
)
def test_what_names_no_owner(text):
    assert Owner.parse(text) is None and Owner.parse(spoiled()) is not None
