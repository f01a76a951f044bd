"""What schedulers answer, on outputs as they write them, and by programs that stand in for theirs."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime

import pytest

from hpcmp.batch import Job, has_ended, scheduler, time_left
from hpcmp.batch.scheduler import flux_left, lsf_left, pbs_left, slurm_left

from .fakes import RECORDED, Programs, enter

DAY, HOUR = 86400, 3600


@pytest.mark.parametrize(
    ("read", "text", "seconds"),
    [
        (slurm_left, "1-02:03:04\n", DAY + 2 * HOUR + 184),
        (slurm_left, "2:03:04\n", 2 * HOUR + 184),
        (slurm_left, "59:12\n", 59 * 60 + 12),
        (slurm_left, "0:37\n", 37),
        (slurm_left, "UNLIMITED\n", None),
        (slurm_left, "NOT_SET\n", None),
        (lsf_left, "1:11 L\n", HOUR + 11 * 60),
        (lsf_left, "0:12 L\n", 12 * 60),
        (lsf_left, "168:00 L  \n", 168 * HOUR),
        (lsf_left, "-\n", None),
        (lsf_left, "0:30 E\n", None),
        (lsf_left, "0:0 X\n", None),
        (flux_left, "5423\n", 5423),
        (flux_left, "0\n", 0),
        (flux_left, "4294967295\n", None),
        (flux_left, "18446744073709551615\n", None),
    ],
)
def test_answers_of_a_line(read: Callable[[str], float | None], text: str, seconds: float | None) -> None:
    assert read(text) == seconds


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (slurm_left, "INVALID\n"),
        (slurm_left, ""),
        (slurm_left, "2:03\n2:04\n"),
        (slurm_left, "0:37 slurm_load_jobs error"),
        (pbs_left, ""),
        (pbs_left, "Job id  Name  User  Time Use S Queue\n"),
        (lsf_left, "TIME_LEFT\n"),
        (lsf_left, ""),
        (flux_left, ""),
        (flux_left, "nan seconds"),
    ],
)
def test_what_is_no_answer_is_refused(read: Callable[[str], float | None], text: str) -> None:
    with pytest.raises(ValueError):
        read(text)


def recorded(name: str) -> str:
    return (RECORDED / name).read_text()


def at(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """So long after the job of recorded/qstat-openpbs began."""
    began = datetime(2026, 11, 23, 10, 0, 5).timestamp()
    monkeypatch.setattr(time, "time", lambda: began + seconds)


@pytest.mark.parametrize(
    ("name", "since", "seconds"),
    [
        ("qstat-openpbs", 300, 3 * HOUR - 300),  # the server's figure, 110 s, is old
        ("qstat-openpbs", 60, 3 * HOUR - 110),
        ("qstat-openpbs", -9000, 3 * HOUR - 110),  # clocks of two time zones
        ("qstat-openpbs", 9 * HOUR, 3 * HOUR - 110),
        ("qstat-starting", 7, 3 * HOUR - 7),  # nothing is known to be used yet
        ("qstat-no-limit", 7, None),
        ("qstat-torque", 7, 144 * HOUR - (78 * HOUR + 21 * 60 + 58)),
    ],
)
def test_pbs_tells_limit_and_use(
    monkeypatch: pytest.MonkeyPatch, name: str, since: float, seconds: float | None
) -> None:
    at(monkeypatch, since)
    assert pbs_left(recorded(name)) == seconds


@pytest.mark.parametrize(
    ("job", "program", "output", "seconds", "call"),
    [
        (Job("Slurm", "4711"), "squeue", "2:03:04", 7384, ["squeue", "--noheader", "--format=%L", "--jobs", "4711"]),
        (Job("PBS", "161018.pbs-01"), "qstat", "", 3 * HOUR - 300, ["qstat", "-f", "161018.pbs-01"]),
        (Job("LSF", "7[3]"), "bjobs", "1:11 L", 4260, ["bjobs", "-noheader", "-o", "time_left", "7[3]"]),
        (Job("Flux", "ƒ2Ab"), "flux", "5423", 5423, ["flux", "job", "timeleft", "ƒ2Ab"]),
    ],
)
def test_each_scheduler_is_asked_once(
    programs: Programs,
    monkeypatch: pytest.MonkeyPatch,
    job: Job,
    program: str,
    output: str,
    seconds: float,
    call: list[str],
) -> None:
    at(monkeypatch, 300)
    programs.add(program, f"echo '{output}'" if output else f"cat '{RECORDED}/qstat-openpbs'")
    assert time_left(job) == seconds
    assert programs.calls == [call]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", "Unable to contact"),
        ("exit 3", "exit code 3"),
        ("echo INVALID", "INVALID"),
        ("exec sleep 30", "timed out"),
        (None, "No such file"),
    ],
)
def test_no_answer_is_told_once_and_ends_nothing(
    programs: Programs,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    body: str | None,
    why: str,
) -> None:
    if body == "exec sleep 30":  # the others have the time that a busy machine takes to start them
        monkeypatch.setattr(scheduler, "_ASKING", 0.5)
    if body:
        programs.add("squeue", body)
    else:
        monkeypatch.setenv("PATH", str(programs.folder))
    assert time_left(Job("Slurm", "4711")) is None
    (record,) = caplog.records
    assert record.levelname == "WARNING" and why in record.getMessage() and "squeue" in record.getMessage()


def test_slurm_may_tell_the_end_of_the_job_in_the_environment(
    programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, 0)
    now = int(time.time())
    enter(monkeypatch, {"SLURM_JOB_END_TIME": str(now + 100)})
    assert 90 < time_left(Job("Slurm", "4711")) <= 100
    assert time_left(Job("Slurm", "4711"), {"SLURM_JOB_END_TIME": str(now - 5)}) == 0
    assert time_left(Job()) is None
    assert not programs.calls


@pytest.mark.parametrize(
    ("body", "ended"),
    [
        ("echo COMPLETED", True),
        ("echo COMPLETED; echo RUNNING", False),
        ("echo NODE_FAIL", False),
        ("true", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", False),
    ],
)
def test_whether_another_job_has_ended(programs: Programs, body: str, ended: bool) -> None:
    programs.add("squeue", body)
    assert has_ended(Job("Slurm", "12")) == ended
    assert programs.calls == [["squeue", "--noheader", "--states=all", "--format=%T", "--jobs=12"]]
    assert not has_ended(Job("PBS", "12")) and not has_ended(Job("Slurm", "1;x"))
    assert len(programs.calls) == 1
    assert has_ended(Job("Slurm", "12_3")) == ended
    assert programs.calls[1][-1] == "--jobs=12_3"
