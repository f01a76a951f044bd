"""A run whose checkpoints are written behind its steps: the same checkpoints, and a failure ends nothing."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.checkpoint import checkpoints, open_checkpoint, share
from hpcmp.checkpoint.snapshot import Copying
from hpcmp.training.config import load_config
from hpcmp.training.trainer import Trainer
from tests.corpus import config, corpus

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

ROOT = Path(__file__).parents[2]

LAYOUTS = {
    1: ("", "layout.zero=1"),
    2: ("layout.tp=2", "layout.zero=3"),
    3: ("layout.pp=3", "layout.zero=2"),
    4: ("layout.tp=2 layout.pp=2", "layout.tp=2 layout.zero=1"),
    8: ("layout.tp=2 layout.pp=2 layout.dp=2", "layout.tp=2 layout.zero=3"),
}
BEHIND = "checkpoint.asynchronous=true checkpoint.every=2 checkpoint.keep=10"


@pytest.fixture
def toml(world: Intracomm, mpi_tmp_path: Path) -> Path:
    if world.rank == 0:
        config(mpi_tmp_path, corpus(mpi_tmp_path))
    world.Barrier()
    return mpi_tmp_path / "tiny.toml"


def trainer(toml: Path, world: Any, name: str, *overrides: str) -> Trainer:
    given = [f"run.directory={toml.parent / name}", *(o for text in overrides for o in text.split())]
    return Trainer(load_config(toml, given), world)


def run(toml: Path, world: Any, name: str, *overrides: str) -> dict[str, Any]:
    """Train in the run directory ``name``; the summary."""
    with trainer(toml, world, name, *overrides) as t:
        return t.train()


def slowly(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, seconds: float) -> None:
    real = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *args: (time.sleep(seconds), real(*args))[1])


def differing(toml: Path, one: str, other: str, step: int) -> list[str]:
    """The tensors that are not the same, bit for bit, in the checkpoints of a step of two runs."""
    a, b = (open_checkpoint(toml.parent / name / "checkpoints" / f"step_{step:08d}") for name in (one, other))
    assert a.tensors == b.tensors and len(a.tensors) > 90
    assert {**a.state, "config": 0, "run": 0} == {**b.state, "config": 0, "run": 0}
    return [name for name in a.tensors if not np.array_equal(a.read(name), b.read(name))]


@pytest.mark.mpi
@pytest.mark.parametrize("which", [0, 1])
def test_the_checkpoints_are_those_of_a_run_that_waits(
    world: Intracomm, toml: Path, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = LAYOUTS[world.size][which]
    whole = run(toml, world, "waits", layout, "checkpoint.every=2 checkpoint.keep=10")
    slowly(monkeypatch, Copying, "finish", 0.2)  # longer than a step
    behind = run(toml, world, "behind", layout, BEHIND)
    assert behind["loss"] == whole["loss"]
    if world.rank == 0:
        assert [differing(toml, "waits", "behind", step) for step in (2, 4, 6)] == [[], [], []]
    world.Barrier()
    again = run(toml, world, "behind", layout, BEHIND, "train.steps=7")
    assert again["step"] == 7


@pytest.mark.mpi
def test_a_step_that_does_not_wait_for_the_copy_is_noticed(
    world: Intracomm, toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail."""
    layout = LAYOUTS[world.size][0]
    run(toml, world, "waits", layout, "checkpoint.every=2 checkpoint.keep=10")
    slowly(monkeypatch, Copying, "finish", 0.5)
    with trainer(toml, world, "torn", layout, BEHIND) as t:
        t.engine.before_update = lambda: None
        t.train()
    if world.rank == 0:
        assert differing(toml, "waits", "torn", 2)


@pytest.mark.mpi
def test_a_save_that_is_due_waits_for_the_one_before(
    world: Intracomm, toml: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slowly(monkeypatch, share, "write", 0.5)
    caplog.set_level("INFO", "hpcmp")
    more = "checkpoint.every=1 train.steps=4"
    summary = run(toml, world, "often", LAYOUTS[world.size][0], BEHIND, more)
    assert summary["checkpoint"].endswith("step_00000004")
    if world.rank == 0:
        root = toml.parent / "often" / "checkpoints"
        assert [path.name for path in checkpoints(root)] == [f"step_{step:08d}" for step in (4, 3, 2, 1)]
        assert caplog.text.count("s for the checkpoint of step") == 1 and "step 2: waited " in caplog.text
        lines = [json.loads(line) for line in Path(summary["metrics"]).read_text().splitlines()]
        saves = [line for line in lines if "checkpoint" in line]
        assert [line["step"] for line in saves] == [0, 1, 2, 3]
        assert all(0.1 < line["held_up_seconds"] <= line["save_seconds"] for line in saves)
        assert caplog.text.count("(training held up for ") == 4


@pytest.mark.mpi
def test_a_save_that_fails_does_not_end_the_run(
    world: Intracomm, toml: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = share.write

    def full(folder: Path, *args: Any) -> Any:
        if "step_00000002" in folder.name and world.rank == world.size - 1:
            raise OSError(28, "No space left on device", str(folder))
        return real(folder, *args)

    monkeypatch.setattr(share, "write", full)
    assert run(toml, world, "full", LAYOUTS[world.size][0], BEHIND)["step"] == 6
    if world.rank == 0:
        root = toml.parent / "full" / "checkpoints"
        assert [path.name for path in checkpoints(root)] == ["step_00000006", "step_00000004"]
        assert not [path for path in root.iterdir() if path.name.startswith(".step")]
        assert "No space left on device; training goes on, there is no checkpoint yet" in caplog.text


@pytest.mark.mpi
def test_the_end_waits_for_the_save_behind(world: Intracomm, toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop of a user's own, a stop, and an error on all ranks."""
    slowly(monkeypatch, share, "write", 0.2)
    layout = LAYOUTS[world.size][0]
    with trainer(toml, world, "loop", layout, BEHIND) as t:
        assert len(list(t)) == 6
        assert t.saving.last and t.saving.last[0] == 6
    with trainer(toml, world, "stop", layout, BEHIND) as t:
        for _ in t:
            if t.step == 2 and world.rank == world.size - 1:
                t.request_stop()
        assert t.step == 3
        assert t.saving.last and t.saving.last[0] == 2
    with trainer(toml, world, "broken", layout, BEHIND) as t:
        for _ in t:
            if t.step == 2:
                break
    assert t.saving.last and t.saving.last[0] == 2
    world.Barrier()


@pytest.mark.mpi
def test_an_error_waits_for_nobody(world: Intracomm, toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch, share, "write", 0.5)
    with pytest.raises(ZeroDivisionError):
        with trainer(toml, world, "error", LAYOUTS[world.size][0], BEHIND) as t:
            for _ in t:
                if t.step == 2:
                    start = time.perf_counter()
                    1 / 0  # noqa: B018
    assert time.perf_counter() - start < 3 and t.saving.saver.running is None
    world.Barrier()
    assert not checkpoints(toml.parent / "error" / "checkpoints")
    world.Barrier()
    assert run(toml, world, "error", LAYOUTS[world.size][0])["finished"]


@pytest.mark.parametrize("where", ["snapshot:1", "rename:0", "prune:all"])
def test_a_job_that_is_killed_goes_on(tmp_path: Path, run_mpi: Any, where: str) -> None:
    toml = config(tmp_path, corpus(tmp_path))
    argv = [sys.executable, "-m", "hpcmp", "train", str(toml), "layout.tp=2", *BEHIND.split()]
    killed = run_mpi(2, argv, timeout=40, env={"HPCMP_FAILPOINT": where}, cwd=ROOT)
    assert killed.returncode != 0
    found = checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in found] == (["step_00000002"] if where == "prune:all" else [])
    done = run_mpi(2, argv, timeout=40, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert ("resumed from" in done.stderr) is bool(found)
    assert open_checkpoint(tmp_path / "run" / "checkpoints").step == 6
