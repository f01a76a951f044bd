"""A run whose checkpoints are written behind its steps: the same checkpoints, and a failure ends nothing."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.checkpoint import checkpoints, open_checkpoint, share
from hpcmp.checkpoint.snapshot import Copying
from hpcmp.training.config import load_config
from hpcmp.training.trainer import Trainer
from tests.checkpoint.held import PAUSE, held
from tests.corpus import config, corpus

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(300)

LAYOUT = {
    1: "layout.zero=1",
    2: "layout.zero=3",
    3: "layout.pp=3",
    4: "layout.tp=2 layout.zero=2",
    8: "layout.tp=2 layout.pp=2 layout.dp=2",
}
EVERY = "checkpoint.every=2 checkpoint.keep=10"
BEHIND = f"checkpoint.asynchronous=true {EVERY}"


def trainer(toml: Path, world: Any, name: str, *overrides: str) -> Trainer:
    given = [f"run.directory={toml.parent / name}", *(o for text in overrides for o in text.split())]
    return Trainer(load_config(toml, given), world)


def run(toml: Path, world: Any, name: str, *overrides: str) -> dict[str, Any]:
    """Train in the run directory ``name``; the summary."""
    with trainer(toml, world, name, *overrides) as t:
        return t.train()


def differing(toml: Path, one: str, other: str, step: int) -> list[str]:
    """The tensors that are not the same, bit for bit, in the checkpoints of a step of two runs."""
    a, b = (open_checkpoint(toml.parent / name / "checkpoints" / f"step_{step:08d}") for name in (one, other))
    assert a.tensors == b.tensors and len(a.tensors) > 90
    assert {**a.state, "config": 0, "run": 0} == {**b.state, "config": 0, "run": 0}
    return [name for name in a.tensors if not np.array_equal(a.read(name), b.read(name))]


@pytest.mark.mpi
def test_the_checkpoints_are_those_of_a_run_that_waits(
    world: Intracomm, toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though no copy is made before the optimizer, or the end, waits for it."""
    layout = LAYOUT[world.size]
    whole = run(toml, world, "waits", layout, EVERY, "train.steps=4")
    with held(monkeypatch, Copying, "finish"):
        behind = run(toml, world, "behind", layout, BEHIND, "train.steps=4")
    assert behind["loss"] == whole["loss"]
    world.Barrier()
    if world.rank == 0:
        assert [differing(toml, "waits", "behind", step) for step in (2, 4)] == [[], []]


@pytest.mark.mpi(size=2)
def test_a_step_that_does_not_wait_for_the_copy_is_noticed(
    world: Intracomm, toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail."""
    layout = LAYOUT[world.size]
    run(toml, world, "waits", layout, EVERY, "train.steps=4")
    with held(monkeypatch, Copying, "finish"), trainer(toml, world, "torn", layout, BEHIND, "train.steps=4") as t:
        t.engine.before_update = lambda: None
        t.train()
    world.Barrier()
    if world.rank == 0:
        assert differing(toml, "waits", "torn", 2)


@pytest.mark.mpi(size=2)
def test_a_save_that_is_due_waits_for_the_one_before(
    world: Intracomm, toml: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hpcmp")
    more = "checkpoint.every=1 train.steps=4"
    with held(monkeypatch, share, "write"):
        summary = run(toml, world, "often", LAYOUT[world.size], BEHIND, more)
    assert summary["checkpoint"].endswith("step_00000004")
    if world.rank == 0:
        root = toml.parent / "often" / "checkpoints"
        assert [path.name for path in checkpoints(root)] == [f"step_{step:08d}" for step in (4, 3, 2, 1)]
        assert caplog.text.count("s for the checkpoint of step") == 1 and "step 2: waited " in caplog.text
        lines = [json.loads(line) for line in Path(summary["metrics"]).read_text().splitlines()]
        saves = [line for line in lines if "checkpoint" in line]
        assert [line["step"] for line in saves] == [0, 1, 2, 3]
        assert all(PAUSE <= line["held_up_seconds"] <= line["save_seconds"] for line in saves[:3])
        assert caplog.text.count("(training held up for ") == 4


@pytest.mark.mpi(size=3)
@pytest.mark.parametrize("behind", ["true", "false"])
def test_a_save_that_fails_does_not_end_the_run(
    world: Intracomm, toml: Path, behind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The last rank has no room for a while: a limit on the size of its files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    given = f"checkpoint.every=2 checkpoint.asynchronous={behind}"
    with trainer(toml, world, f"full-{behind}", LAYOUT[world.size], given) as t:
        try:
            for _ in t:
                if t.step == 1 and world.rank == world.size - 1:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
                if t.step == 2:
                    t.saving.finish()
                    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert t.step == 6
    if world.rank == 0:
        root = toml.parent / f"full-{behind}" / "checkpoints"
        assert [path.name for path in checkpoints(root)] == ["step_00000006", "step_00000004"]
        assert not [path for path in root.iterdir() if path.name.startswith(".step")]
        last = f"rank_{world.size - 1:05d}.h5"
        assert f"{last}: File too large; training goes on, there is no checkpoint yet" in caplog.text


@pytest.mark.mpi(size=2)
def test_the_end_waits_for_the_save_behind(world: Intracomm, toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop of a user's own, a stop, and a loop that is left."""
    layout = LAYOUT[world.size]
    with held(monkeypatch, share, "write"):
        with trainer(toml, world, "loop", layout, BEHIND) as t:
            assert len(list(t)) == 6
            assert t.saving.last and t.saving.last[0] == 6
        with trainer(toml, world, "stop", layout, BEHIND) as t:
            for _ in t:
                if t.step == 2 and world.rank == world.size - 1:
                    t.request_stop()
            assert t.step == 3
            assert t.saving.last and t.saving.last[0] == 2
        with trainer(toml, world, "left", layout, BEHIND) as t:
            for _ in t:
                if t.step == 2:
                    break
        assert t.saving.last and t.saving.last[0] == 2


@pytest.mark.mpi(size=2)
def test_an_error_waits_for_nobody(world: Intracomm, toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for the other rank, which is still in the body, nor for the disk."""
    with held(monkeypatch, share, "write"):
        with pytest.raises(ZeroDivisionError):
            with trainer(toml, world, "error", LAYOUT[world.size], BEHIND) as t:
                for _ in t:
                    if t.step == 2:
                        if world.rank:
                            world.recv(source=0)
                        1 / 0  # noqa: B018
        assert t.saving.saver.running is None
        if world.rank == 0:
            world.send("it has ended", 1)
    world.Barrier()
    assert not checkpoints(toml.parent / "error" / "checkpoints")
    world.Barrier()
    assert run(toml, world, "error", LAYOUT[world.size])["finished"]


def test_a_job_that_is_killed_goes_on(tmp_path: Path, run_mpi: Any) -> None:
    """Once a checkpoint is committed; more of it in tests/checkpoint."""
    toml = config(tmp_path, corpus(tmp_path))
    given = ["layout.tp=2", "train.kernels=reference", *BEHIND.split()]
    argv = [sys.executable, "-m", "hpcmp", "train", str(toml), *given]
    killed = run_mpi(2, argv, timeout=240, env={"HPCMP_FAILPOINT": "prune:all"}, cwd=ROOT)
    assert killed.returncode != 0
    found = checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in found] == ["step_00000002"]
    done = run_mpi(2, argv, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert f"resumed from {found[0]}" in done.stderr
    assert open_checkpoint(tmp_path / "run" / "checkpoints").step == 6
