"""A run before the end of its job: it saves in time, is run again as long as it makes progress, and loses nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from hpcmp.training import limits
from hpcmp.training.config import load_config
from hpcmp.training.report import Run, report
from hpcmp.training.trainer import Trainer
from tests.batch.fakes import SLURM, VARIABLES, Programs, enter
from tests.corpus import config, corpus

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.timeout(120)
REQUEUE = ["scontrol", "requeue", "4711"]
KERNELS = "train.kernels=reference"  # which start at once


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus"))


class Clock:
    """Time that passes in steps alone, ten seconds in each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(limits, "time", SimpleNamespace(monotonic=lambda: self.now, time=time.time))

    def drive(self, trainer: Trainer) -> Trainer:
        begin = trainer.engine.begin

        def slow(*args: Any, **more: Any) -> Any:
            self.now += 10
            return begin(*args, **more)

        trainer.engine.begin = slow  # type: ignore[method-assign]
        return trainer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """In a job of Slurm that has 105 seconds left."""
    made = Programs(tmp_path / "bin")
    made.add("squeue", "echo 1:45")
    made.add("scontrol", "exit 0")
    enter(monkeypatch, SLURM | {"PATH": made.path})
    return made


def start(toml: Path, clock: Clock, *given: str, comm: Any = None, save_seconds: float = 0.0) -> dict[str, Any]:
    settings = ["train.steps=1000", "train.margin=20", *given]
    with clock.drive(Trainer(load_config(toml, settings), comm)) as trainer:
        trainer.saving.slowest = save_seconds
        return trainer.train()


# At the start of a step 105 s less 10 s for each before it are left. It is the last one unless there is time for two
# of 10 s, a save, and 20 s to spare.
@pytest.mark.parametrize(("save_seconds", "steps"), [(0.0, 8), (16.0, 6), (49.0, 3), (1000.0, 1)])
def test_it_stops_when_another_step_would_be_one_too_many(
    tmp_path: Path, data: Path, programs: Programs, clock: Clock, save_seconds: float, steps: int
) -> None:
    summary = start(config(tmp_path, data), clock, save_seconds=save_seconds)
    assert summary["step"] == steps and not summary["finished"]
    assert f"{105 - 10 * (steps - 1)} s are left to Slurm job 4711" in summary["reason"]
    assert f"a save {save_seconds:.1f} s" in summary["reason"]
    assert Path(summary["checkpoint"]).name == f"step_{steps:08d}"
    assert summary["requeue"] is None and summary["stuck"] is False  # train.requeue is off
    assert [call[0] for call in programs.calls] == ["squeue"]


def test_a_save_that_runs_behind_the_steps_comes_first(
    tmp_path: Path, data: Path, programs: Programs, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Trainer(load_config(config(tmp_path, data), ["train.margin=20"])) as trainer:
        trainer.saving.slowest = 7.0
        assert trainer.limits.needed(0) == 27
        monkeypatch.setattr(type(trainer.saving.saver), "running", 3)
        assert trainer.limits.needed(0) == 34
        monkeypatch.undo()


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize(("step_seconds", "save_seconds", "every"), [(40, 3, None), (7, 90, 3), (40, 90, 3)])
def test_the_end_is_never_in_the_margin(
    tmp_path: Path,
    data: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    step_seconds: int,
    save_seconds: int,
    every: int | None,
    ahead: int,
) -> None:
    """Whatever the limit: steps longer than the margin, and saves on the way, the last of them just before the end."""
    enter(monkeypatch, SLURM)
    toml = config(tmp_path, data)
    for left in range(5 * step_seconds + 2 * save_seconds, 8 * step_seconds + 2 * save_seconds, step_seconds):
        monkeypatch.setattr(limits, "time_left", lambda job, left=left: float(left))
        began = clock.now
        settings = [
            "train.steps=1000",
            "train.margin=20",
            f"checkpoint.every={every or 'none'}",
            f"train.ahead={ahead}",
        ]
        with Trainer(load_config(toml, [*settings, "checkpoint.resume=false"])) as trainer:
            drive(trainer, clock, step_seconds, save_seconds)
            summary = trainer.train()
        assert left - (clock.now - began) >= 20, (left, summary["reason"])
        assert summary["step"] >= 2


def drive(trainer: Trainer, clock: Clock, step_seconds: int, save_seconds: int) -> None:
    """Let steps and saves of ``trainer`` take so long."""
    begin, now = trainer.engine.begin, trainer.saving.now

    def slow(*args: Any, **more: Any) -> Any:
        running = begin(*args, **more)
        result = running.result

        def later() -> Any:  # as on a GPU: queueing a step takes no time
            clock.now += step_seconds
            return result()

        running.result = later  # type: ignore[method-assign]
        return running

    def save(number: int) -> Path:
        path = now(number)
        clock.now += save_seconds
        trainer.saving.slowest = save_seconds
        trainer.saving.held += save_seconds
        return path

    trainer.engine.begin, trainer.saving.now = slow, save  # type: ignore[method-assign]
    trainer.saving.slowest = save_seconds


def test_what_a_save_costs_is_known_from_the_start_before(
    tmp_path: Path, data: Path, programs: Programs, clock: Clock
) -> None:
    toml = config(tmp_path, data)
    start(toml, clock, "checkpoint.every=4")
    metrics = tmp_path / "run" / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    saves = [record["save_seconds"] for record in records if "save_seconds" in record]
    assert len(saves) == 2
    with Trainer(load_config(toml)) as trainer:
        assert trainer.limits.save_seconds == max(saves)
        trainer.save()
        assert trainer.limits.save_seconds == trainer.saving.slowest > 0


def test_a_save_that_was_never_measured_is_reckoned_from_its_size(
    tmp_path: Path, data: Path, programs: Programs, clock: Clock
) -> None:
    with Trainer(load_config(config(tmp_path, data))) as trainer:
        parameters = trainer.engine.architecture.parameters
        assert trainer.limits.save_seconds == pytest.approx(12 * parameters / 100e6)


@pytest.mark.parametrize(("margin", "warned"), [(52, 0), (53, 1)])
def test_a_margin_of_more_than_half_of_the_limit_is_told_once(
    tmp_path: Path,
    data: Path,
    programs: Programs,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    margin: int,
    warned: int,
) -> None:
    start(config(tmp_path, data), clock, "train.steps=2", f"train.margin={margin}")
    told = [record.getMessage() for record in caplog.records if "train.margin" in record.getMessage()]
    assert len(told) == warned
    for text in told:
        assert text.startswith("train.margin = 53 s is more than half of the 105 s that Slurm job 4711 has left: ")


@pytest.mark.parametrize("answer", ["echo UNLIMITED", "echo INVALID", "exit 1"])
def test_without_a_known_limit_it_runs_to_the_end(
    tmp_path: Path, data: Path, programs: Programs, clock: Clock, caplog: pytest.LogCaptureFixture, answer: str
) -> None:
    programs.add("squeue", answer)
    assert start(config(tmp_path, data), clock, "train.steps=12")["finished"]
    told = sum("unknown" in record.getMessage() for record in caplog.records)
    assert told == ("UNLIMITED" not in answer)


def test_minutes_need_no_scheduler(
    tmp_path: Path, data: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    enter(monkeypatch, {})
    summary = start(config(tmp_path, data), clock, "train.minutes=0.7", "train.requeue=true")
    assert summary["step"] == 6 and summary["reason"] == "train.minutes = 0.7 are over"
    assert summary["requeue"] is None
    assert "HPCMP_RESUBMIT is not set" in caplog.text
    monkeypatch.setenv("HPCMP_RESUBMIT", "resubmit me")
    assert start(config(tmp_path, data), clock, "train.minutes=0.7", "train.requeue=true")["requeue"] == [
        *("sh", "-c", "resubmit me")
    ]


@pytest.mark.parametrize(
    ("requeue", "also", "command"),
    [(True, None, REQUEUE), (False, None, None), (True, False, None), (False, True, None)],
)
def test_a_stop_for_good_is_not_requeued(
    tmp_path: Path,
    data: Path,
    programs: Programs,
    clock: Clock,
    requeue: bool,
    also: bool | None,
    command: list[str] | None,
) -> None:
    with Trainer(load_config(config(tmp_path, data), ["train.requeue=true"])) as trainer:
        trainer.request_stop("one", requeue=requeue)
        if also is not None:
            trainer.request_stop("other", requeue=also)
        summary = trainer.train()
    assert summary["requeue"] == command and summary["step"] == 1


def test_a_job_without_progress_is_requeued_twice_and_no_more(
    tmp_path: Path, data: Path, programs: Programs, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    toml, lost = config(tmp_path, data), ("train.requeue=true", "checkpoint.resume=false")
    starts = [start(toml, clock, *lost, save_seconds=1000) for _ in range(4)]
    assert [(s["requeue"], s["stuck"]) for s in starts] == [(REQUEUE, False)] * 2 + [(None, True), (REQUEUE, False)]
    assert caplog.text.count("it makes no progress, and is not requeued again") == 1
    records = [json.loads(line) for line in (tmp_path / "run" / limits.NAME).read_text().splitlines()]
    assert [(r["began"], r["ended"], r["requeued"], r["job"]) for r in records] == [
        (0, 1, True, "4711"),
        (0, 1, True, "4711"),
        (0, 1, False, "4711"),
        (0, 1, True, "4711"),
    ]
    for _ in range(3):  # with progress there is no end to it
        assert start(toml, clock, "train.requeue=true", save_seconds=1000)["requeue"] == REQUEUE


def test_what_cannot_tell_of_progress_requeues_nothing(
    tmp_path: Path, data: Path, programs: Programs, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run" / limits.NAME).mkdir(parents=True)
    summary = start(config(tmp_path, data), clock, "train.requeue=true")
    assert summary["requeue"] is None and not summary["stuck"] and summary["checkpoint"]
    assert "the job is not requeued" in caplog.text


@pytest.mark.mpi
@pytest.mark.fault(19)
def test_rank_0_asks_and_all_ranks_stop_together(
    world: Intracomm, mpi_tmp_path: Path, tmp_path: Path, programs: Programs, clock: Clock
) -> None:
    toml = mpi_tmp_path / "tiny.toml"
    if world.rank == 0:
        config(mpi_tmp_path, corpus(mpi_tmp_path))
    world.Barrier()
    summary = start(toml, clock, "train.requeue=true", comm=world)
    told = world.allgather((summary["step"], summary["reason"], summary["requeue"]))
    assert told == [(8, told[0][1], REQUEUE)] * world.size and "are left to Slurm job 4711" in told[0][1]
    assert world.allgather(len(programs.calls)) == [1] + [0] * (world.size - 1)


# The command itself, in jobs with half a minute left, less than the margin: each makes one step.


@pytest.fixture
def environ(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    programs.add("squeue", "echo 0:30")
    return {name: value for name, value in os.environ.items() if name not in VARIABLES} | SLURM


def train(toml: Path, environ: dict[str, str], *given: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "hpcmp", "train", str(toml), "train.steps=3", KERNELS, "--json", *given]
    return subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=60)


def losses(run: Path) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def test_a_run_in_three_jobs_is_the_run_in_one(
    tmp_path: Path, data: Path, programs: Programs, environ: dict[str, str], run_mpi: Callable[..., Any]
) -> None:
    toml, whole = config(tmp_path, data), tmp_path / "whole"
    with Trainer(load_config(toml, ["train.steps=3", f"run.directory={whole}", "train.margin=0", KERNELS])) as trainer:
        trainer.limits._end = None
        expected = trainer.train()
    assert len(losses(whole)) == 3
    done = [train(toml, environ, "train.requeue=true") for _ in range(3)]
    assert [each.returncode for each in done] == [75, 75, 0], done[-1].stderr
    results = [json.loads(each.stdout) for each in done]
    assert [result["step"] for result in results] == [1, 2, 3]
    assert [call for call in programs.calls if call[0] == "scontrol"] == [REQUEUE] * 2
    assert "requeueing: scontrol requeue 4711" in done[0].stderr and "requeueing" not in done[2].stderr
    assert losses(tmp_path / "run") == losses(whole)
    assert results[2]["held_out_loss"] == expected["held_out_loss"]
    told = report(Run(tmp_path / "run"))
    assert [start["end"]["requeued"] for start in told["starts"]] == [True, True, False]
    assert told["ending"] == {"how": "finished", "text": "finished: step 3 of 3"}


@pytest.mark.fault(19)
def test_on_two_ranks_one_requeues(
    tmp_path: Path, data: Path, programs: Programs, environ: dict[str, str], run_mpi: Callable[..., Any]
) -> None:
    argv = [sys.executable, "-m", "hpcmp", "train", str(config(tmp_path, data)), "train.steps=3", KERNELS, "--json"]
    done = run_mpi(2, [*argv, "train.requeue=true"], env={"PATH": programs.path, **SLURM})
    assert done.returncode == 75, done.stderr
    assert json.loads(done.stdout)["requeue"] == REQUEUE
    assert [call[0] for call in programs.calls] == ["squeue", "scontrol"]
    how, text = report(Run(tmp_path / "run"))["ending"].values()
    assert how == "stopped" and text.startswith("stopped after step 1 of 3: ")
    assert " s are left to Slurm job 4711: " in text
    assert text.endswith("; its job is to run again")


def test_a_requeue_that_is_refused_is_told_and_a_loop_ends_with_78(
    tmp_path: Path, data: Path, programs: Programs, environ: dict[str, str]
) -> None:
    programs.add("scontrol", "echo 'Requested operation is presently disabled' >&2; exit 1")
    toml = config(tmp_path, data)
    done = [train(toml, environ, "train.requeue=true", "checkpoint.resume=false") for _ in range(3)]
    assert [each.returncode for each in done] == [75, 75, 78]
    told = "the job is not requeued: `scontrol requeue 4711`: Requested operation is presently disabled"
    assert [told in each.stderr for each in done] == [True, True, False]
    assert "it makes no progress" in done[2].stderr
