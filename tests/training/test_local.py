"""A run and its local tier: what a lost process, lost nodes and damaged checkpoints cost it, and what it says."""

from __future__ import annotations

import secrets
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcmp.checkpoint import open_checkpoint
from hpcmp.checkpoint.tier import NAME
from hpcmp.training import trainer
from hpcmp.training.config import load_config
from hpcmp.training.trainer import Trainer
from tests.corpus import config, corpus
from tests.harness.launch import ROOT

RUN = """
import os, signal, sys
from pathlib import Path
from mpi4py import MPI
from hpcmp.training.config import load_config
from hpcmp.training.trainer import Trainer

toml, memory = sys.argv[1:3]
for name, _, dies in (word.partition(":") for word in sys.argv[3:]):
    local = [f"checkpoint.local={memory}/node{{node}}", "checkpoint.local_every=2"] if name == "killed" else []
    given = ["layout.dp=2", "train.kernels=reference", f"run.directory={Path(toml).parent / name}", *local]
    with Trainer(load_config(Path(toml), given), MPI.COMM_WORLD) as trainer:
        if trainer.logs:
            print(name, trainer.step, flush=True)
        for _ in trainer if dies else ():
            if trainer.step == int(dies) and not trainer.logs:
                os.kill(os.getpid(), signal.SIGKILL)
        trainer.train()
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return config(tmp_path, corpus(tmp_path))


def settings(toml: Path, name: str, *given: str) -> list[str]:
    local = [f"checkpoint.local={toml.parent}/local", "checkpoint.local_every=2"]
    return [f"run.directory={toml.parent / name}", *local, *given]


def crash(toml: Path, name: str, steps: int, *given: str) -> int:
    """Run to ``steps`` and end without a checkpoint, as a crash would; returns the step at which it began."""
    with Trainer(load_config(toml, settings(toml, name, *given))) as run:
        began = run.step
        for _ in run:
            if run.step == steps:
                break
    return began


def tensors(path: Path) -> dict[str, Any]:
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name).tobytes() for name in checkpoint.tensors}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no memory of the node that has a path")
def test_a_killed_rank_costs_the_steps_since_the_last_copy(toml: Path, run_mpi: Any) -> None:
    """On two nodes, in their memory, with no ordinary checkpoint: bit for bit what an undisturbed run ends with."""
    memory = Path("/dev/shm") / f"hpcmp-test-{secrets.token_hex(8)}"

    def job(*runs: str) -> Any:
        return run_mpi(2, [sys.executable, "-c", RUN, str(toml), str(memory), *runs], 120, {"HPCMP_NODES": "0,1"}, ROOT)

    try:
        died = job("whole", "killed:5")
        assert died.returncode != 0 and died.stdout.split() == ["whole", "0", "killed", "0"], died.stderr
        again = job("killed")
        assert again.returncode == 0 and again.stdout.split() == ["killed", "4"], again.stderr
        assert list(memory.glob("node*/*")) == []  # nothing of the run is left in memory
    finally:
        shutil.rmtree(memory, ignore_errors=True)
    whole, killed = (tensors(toml.parent / name / "checkpoints") for name in ("whole", "killed"))
    assert whole == killed and len(whole) > 60
    assert not (toml.parent / "killed" / "checkpoints" / NAME).exists()


def test_the_last_one_saved_that_is_sound_is_taken(toml: Path) -> None:
    """Be it on the nodes or not, and the ordinary ones later or not."""
    every = "checkpoint.every=3"
    assert crash(toml, "run", 6, every) == 0
    newest = toml.parent / "run" / "checkpoints" / "step_00000006"
    flip(newest / "rank_00000.h5")
    shutil.copytree(toml.parent / "local", toml.parent / "kept")
    shutil.copytree(toml.parent / "run", toml.parent / "again")
    assert crash(toml, "run", 5, every) == 4  # and saves nothing on the way to 5
    (local,) = toml.parent.glob("local/*/step_00000004-*")
    flip(local / "rank_00000.h5")
    assert crash(toml, "run", 4, every) == 3
    shutil.rmtree(toml.parent / "local")
    (toml.parent / "kept").rename(toml.parent / "local")
    with Trainer(load_config(toml, settings(toml, "again"))) as run:
        assert run.train()["step"] == 6
    assert open_checkpoint(toml.parent / "again" / "checkpoints" / newest.name).verify() == []  # it is saved anew


def test_lost_nodes_cost_the_steps_since_the_last_checkpoint_and_are_told(
    toml: Path, caplog: pytest.LogCaptureFixture
) -> None:
    crash(toml, "run", 5, "checkpoint.every=3")
    shutil.rmtree(toml.parent / "local")
    caplog.clear()
    assert crash(toml, "run", 4, "checkpoint.every=3") == 3
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == ["checkpoint.local: there is no step of this run on its nodes"]


def test_a_run_that_has_only_copies_on_its_nodes_has_begun(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it measured then is not measured again."""
    asked = []
    monkeypatch.setattr(trainer, "measured_before", lambda c, mesh, path: (asked.append(path), c)[1])
    crash(toml, "run", 3)
    assert crash(toml, "run", 4) == 2
    assert asked == [None, toml.parent / "run" / "config.toml"]


def test_two_runs_share_a_directory(toml: Path) -> None:
    crash(toml, "one", 3)
    crash(toml, "two", 5)
    assert len(list(toml.parent.glob("local/*"))) == 2
    with Trainer(load_config(toml, settings(toml, "two"))) as run:
        assert run.step == 4
        run.train()
    assert [path.name[:13] for path in toml.parent.glob("local/*/*")] == ["step_00000002"]
    assert crash(toml, "one", 3) == 2
