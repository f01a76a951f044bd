"""A run has its directories to itself, says which of its checkpoints are good, and keeps those."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hpcmp.checkpoint import CheckpointSaveError, checkpoints, lock, open_checkpoint, owner
from hpcmp.comm.mesh import Mesh
from hpcmp.errors import InputError, InUseError
from hpcmp.training.config import Config, Run, load_config
from hpcmp.training.directories import Directories
from hpcmp.training.trainer import Trainer
from tests.checkpoint.locks import until
from tests.corpus import config, corpus
from tests.faults import permissions

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def toml(tmp_path: Path, data: Path) -> Path:
    return config(tmp_path, data)


def locks(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*lock*"))


def neighbour(folder: Path) -> None:
    """Put the lock of another process, which lives, into a folder."""
    parent = os.getppid()
    theirs = dataclasses.replace(owner.this_process(), pid=parent, start=owner._stat(parent)[1])
    (folder / "theirs").write_bytes(theirs.render())
    (folder / "theirs").replace(folder / "lock")


def test_two_runs_never_share_a_directory(toml: Path, tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (tmp_path / "link").symlink_to(run, target_is_directory=True)
    with Trainer(load_config(toml)) as trainer:
        trainer.save()
        before = sorted(tmp_path.rglob("*"))
        assert locks(run) == ["checkpoints/lock", "lock"]
        for where, overrides in (
            (run, []),
            (run, [f"checkpoint.directory={elsewhere}"]),
            (run / "checkpoints", [f"run.directory={elsewhere}", f"checkpoint.directory={run}/checkpoints"]),
            (tmp_path / "link", [f"run.directory={tmp_path}/link"]),
        ):
            with pytest.raises(InUseError, match=f"{where} is in use by process {os.getpid()} "):
                Trainer(load_config(toml, overrides))
        assert locks(elsewhere) == []
        assert [p for p in sorted(tmp_path.rglob("*")) if elsewhere not in (p, *p.parents)] == before
        with Trainer(load_config(toml, [f"run.directory={elsewhere}"])):
            pass
    assert locks(tmp_path) == []


def test_one_directory_for_both(toml: Path, tmp_path: Path) -> None:
    with Trainer(load_config(toml, [f"checkpoint.directory={tmp_path}/run"])):
        assert locks(tmp_path) == ["run/lock"]
    assert locks(tmp_path) == []


def test_whatever_ends_a_run_it_gives_its_directories_back(toml: Path, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Trainer(load_config(toml)) as trainer:
        trainer.save()
        raise ZeroDivisionError
    assert locks(tmp_path) == []
    with pytest.raises(InputError, match="model.ffn"):
        Trainer(load_config(toml, ["model.ffn=34"]))
    assert locks(tmp_path) == []


def test_a_run_whose_directory_is_taken_away_ends_and_saves_nothing(
    toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    folder = tmp_path / "run" / "checkpoints"
    with Trainer(load_config(toml)) as trainer:
        for _ in trainer:
            if trainer.step == 3:
                trainer.save()
                neighbour(folder)
                until(lambda: trainer.directories.lost)
        assert trainer.step == 4
        assert trainer.stop.reason.startswith(f"{folder} has been taken over by process {os.getppid()} ")
        with pytest.raises(CheckpointSaveError, match=f"{folder} is in use by process {os.getppid()} "):
            trainer.save()
    assert [path.name for path in checkpoints(folder)] == ["step_00000003"]
    assert locks(tmp_path) == ["run/checkpoints/lock"]  # theirs


@pytest.mark.parametrize("key", ["run.directory", "checkpoint.directory"])
def test_a_read_only_directory_is_found_at_the_start(toml: Path, tmp_path: Path, key: str) -> None:
    (tmp_path / "closed").mkdir(0o500)
    for folder in (tmp_path / "closed", tmp_path / "closed" / "new"):
        with permissions(), pytest.raises(InputError, match=f"{key}: cannot write in {folder}: Permission denied"):
            Trainer(load_config(toml, [f"{key}={folder}"]))
    assert locks(tmp_path) == [] and not list((tmp_path / "closed").iterdir())


def start(toml: Path, *overrides: str) -> int:
    """The process number of a run that has taken three steps, and takes no more until it is killed."""
    pipe, end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with Trainer(load_config(toml, [*overrides])) as trainer:
                for _ in trainer:
                    if trainer.step == 3:
                        os.write(end, b"!")
                        signal.pause()
        finally:
            os._exit(3)
    os.close(end)
    with open(pipe, "rb") as stream:
        assert stream.read(1) == b"!"
    return child


def command(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "hpcmp", *argv], capture_output=True, text=True, timeout=240)


def test_the_command_refuses_and_takes_over_from_the_dead(toml: Path, tmp_path: Path) -> None:
    first = start(toml, "checkpoint.every=1")
    second = command("train", str(toml), "--json")
    said = [line for line in second.stderr.splitlines() if line.startswith("hpcmp: error:")]
    assert second.returncode == 2 and len(said) == 1 and "Traceback" not in second.stderr
    assert said[0].startswith(f"hpcmp: error: {tmp_path}/run is in use by process {first} of ")
    assert json.loads(second.stdout) == {"error": said[0].removeprefix("hpcmp: error: "), "exit_code": 2}
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert locks(tmp_path) == ["run/checkpoints/lock", "run/lock"]
    path = open_checkpoint(tmp_path / "run" / "checkpoints").path  # who only reads needs no lock
    assert path.name == "step_00000003" and locks(tmp_path) == ["run/checkpoints/lock", "run/lock"]
    third = command("train", str(toml), "train.steps=4", "train.kernels=reference")
    assert third.returncode == 0, third.stderr
    assert third.stderr.count(f"taken over from process {first} of ") == 2 and f"resumed from {path}" in third.stderr
    assert locks(tmp_path) == []


def test_the_best_checkpoints_stay(toml: Path, tmp_path: Path) -> None:
    kept = ["checkpoint.every=1", "checkpoint.keep=1", "checkpoint.keep_best=2", "checkpoint.keep_every=4"]
    with Trainer(load_config(toml, [*kept, "train.steps=3"])) as trainer:
        trainer.train()
        run = trainer.run
    with Trainer(load_config(toml, [*kept, "optimizer.learning_rate=0.1"])) as trainer:
        trainer.train()
        assert trainer.run == run
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"] + 1: line["held_out"] for line in lines if "held_out" in line}
    assert list(losses) == [1, 2, 3, 4, 5, 6]  # each was taken once
    found = {c.step: c for c in map(open_checkpoint, checkpoints(tmp_path / "run" / "checkpoints"))}
    best = sorted((step for step in losses if step != 4), key=losses.__getitem__)[:2]
    assert set(found) == {*best, 4, 6}
    assert all(c.state["held_out_loss"] == losses[step] and c.state["run"] == run for step, c in found.items())


def test_the_loss_of_a_step_that_was_not_evaluated_is_not_known(toml: Path, tmp_path: Path) -> None:
    with Trainer(load_config(toml, ["checkpoint.every=2", "checkpoint.keep=9", "run.evaluate_every=4"])) as trainer:
        trainer.train()
    found = map(open_checkpoint, checkpoints(tmp_path / "run" / "checkpoints"))
    assert {c.step: c.state["held_out_loss"] is not None for c in found} == {2: False, 4: True, 6: False}


def test_the_best_needs_held_out_samples(toml: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"checkpoint.keep_best: data.path holds out less"):
        Trainer(load_config(toml, ["checkpoint.keep_best=1", "model.sequence=10000"]))
    assert locks(tmp_path) == []


def test_a_run_from_the_beginning_leaves_the_other_runs_checkpoints(toml: Path, tmp_path: Path) -> None:
    with Trainer(load_config(toml, ["train.steps=2"])) as trainer:
        trainer.train()
    with Trainer(load_config(toml, ["checkpoint.resume=false", "checkpoint.every=1", "checkpoint.keep=1"])) as trainer:
        for _ in trainer:
            if trainer.step == 1:
                break
        found = [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")]
    assert found == ["step_00000001", "step_00000002"]


@pytest.mark.mpi(size=3)
def test_every_rank_is_told_that_a_directory_is_in_use(world: Intracomm, mpi_tmp_path: Path) -> None:
    given = Config(run=Run(directory=str(mpi_tmp_path / "run"))).resolved()
    mesh = Mesh(world, tp=world.size)
    first = Directories(given, mesh)
    assert locks(mpi_tmp_path) == ["run/checkpoints/lock", "run/lock"]
    world.Barrier()
    with pytest.raises(InUseError, match="run is in use by process"):
        Directories(given, mesh)
    first.close()
    world.Barrier()
    assert locks(mpi_tmp_path) == []
    world.Barrier()
    if world.rank == 0:
        (mpi_tmp_path / "run" / "checkpoints").rmdir()
        (mpi_tmp_path / "run" / "checkpoints").touch()
    world.Barrier()
    with pytest.raises(InputError, match="checkpoint.directory: cannot write in .*/run/checkpoints: File exists"):
        Directories(given, mesh)
    assert locks(mpi_tmp_path) == []
    mesh.close()
