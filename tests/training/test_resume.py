"""Going on with everything a run is made of: on another precision, with another optimizer, from the nodes' copies."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.checkpoint import open_checkpoint
from hpcmp.data.prepare import prepare
from hpcmp.errors import InputError
from hpcmp.training.config import load_config
from hpcmp.training.trainer import Trainer
from tests.corpus import config, corpus

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi

NODES = {1: "0", 2: "0,1", 3: "0,0,1", 4: "0,0,1,1", 8: "0,0,1,1,2,2,3,3"}
LAYOUT = {1: "dp=1", 2: "dp=2", 3: "tp=3", 4: "dp=2 layout.tp=2 layout.zero=1", 8: "dp=2 layout.pp=2 layout.tp=2"}


@pytest.fixture
def toml(world: Intracomm, mpi_tmp_path: Path) -> Path:
    if world.rank == 0:
        config(mpi_tmp_path, corpus(mpi_tmp_path))
    world.Barrier()
    return mpi_tmp_path / "tiny.toml"


def settings(toml: Path, name: str, *given: str) -> list[str]:
    return [f"run.directory={toml.parent / name}", *(word for text in given for word in text.split())]


def run(toml: Path, world: Any, name: str, *given: str) -> dict[str, Any]:
    with Trainer(load_config(toml, settings(toml, name, *given)), world) as trainer:
        return trainer.train()


def crash(toml: Path, world: Any, name: str, steps: int, *given: str) -> int:
    """Run to ``steps`` and end without a checkpoint, as a crash would; returns the step at which it began."""
    with Trainer(load_config(toml, settings(toml, name, *given)), world) as trainer:
        began = trainer.step
        for _ in trainer:
            if trainer.step == steps:
                break
    return began


def tensors(toml: Path, name: str, step: int = 6) -> dict[str, Any]:
    checkpoint = open_checkpoint(toml.parent / name / "checkpoints" / f"step_{step:08d}")
    return {tensor: checkpoint.read(tensor) for tensor in checkpoint.tensors}


def assert_same(toml: Path, a: str, b: str) -> None:
    left, right = tensors(toml, a), tensors(toml, b)
    assert left.keys() == right.keys() and len(left) > 60
    assert [name for name in left if left[name].tobytes() != right[name].tobytes()] == []


@pytest.mark.parametrize("where", [2, 3, 4])
def test_bit_for_bit_across_all_that_a_run_counts(world: Intracomm, mpi_tmp_path: Path, where: int) -> None:
    """Dropout, the loss scale of float16, microbatches, and an epoch of data that ends before, at and after the
    checkpoint."""
    if world.rank == 0:
        text = mpi_tmp_path / "few"
        text.mkdir()
        (text / "a.txt").write_text("".join(f"{i} times {i} is {i * i}\n" for i in range(22)))
        config(mpi_tmp_path, mpi_tmp_path / "tokens.h5")
        prepare([text], mpi_tmp_path / "tokens.h5", held_out=0)
    world.Barrier()
    toml = mpi_tmp_path / "tiny.toml"
    given = f"train.dtype=float16 train.loss_scale_window=2 layout.{LAYOUT[world.size]}"
    with Trainer(load_config(toml, settings(toml, "whole", given)), world) as trainer:
        windows = trainer.inputs.sampler.windows
        assert windows == 15 and trainer.config.model.dropout > 0 and trainer.engine.microbatches() > 1
        whole = trainer.train()
    run(toml, world, "parts", given, f"train.steps={where}")
    parts = run(toml, world, "parts", given)
    assert parts["loss"] == whole["loss"]
    if world.rank == 0:
        assert_same(toml, "whole", "parts")
        states = [open_checkpoint(toml.parent / name / "checkpoints").state for name in ("whole", "parts")]
        for key in ("loss_scale", "sampler", "optimizer_steps"):
            assert states[0][key] == states[1][key], key
        assert states[0]["loss_scale"]["scale"] > 65536


def test_the_loss_scale_goes_on_from_float16_alone(world: Intracomm, toml: Path) -> None:
    """A constant one says nothing about float16; what float16 had found is kept, and not by other precisions."""
    scales = {}
    kinds = {"same": ("float16", "float16"), "up": ("float32", "float16"), "down": ("float16", "bfloat16")}
    for name, (then, now) in kinds.items():
        window = "train.loss_scale_window=2 train.steps"
        run(toml, world, name, f"{window}=2 train.dtype={then}")
        run(toml, world, name, f"{window}=3 train.dtype={now}")
        scales[name] = open_checkpoint(toml.parent / name / "checkpoints").state["loss_scale"]
    assert scales == {
        "same": {"scale": 131072.0, "good": 1},
        "up": {"scale": 65536.0, "good": 1},
        "down": {"scale": 1.0, "good": 0},
    }


def test_another_optimizer_begins_afresh_if_it_may(
    world: Intracomm, toml: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hpcmp")
    muon = "optimizer.name=muon checkpoint.fresh_optimizer=true train.steps"
    run(toml, world, "changed", "train.steps=2")
    with pytest.raises(InputError, match=r"optimizer.name was 'adamw', now it is 'muon' \(checkpoint.fresh_optimizer"):
        run(toml, world, "changed", "optimizer.name=muon")
    caplog.clear()
    run(toml, world, "changed", f"{muon}=4")
    told = [r.getMessage() for r in caplog.records if "fresh_optimizer" in r.getMessage()]
    assert len(told) == (world.rank == 0)
    assert all("holds states of adamw; those of muon begin at zero" in line for line in told)
    assert open_checkpoint(toml.parent / "changed" / "checkpoints").state["optimizer_steps"] == 2
    caplog.clear()
    run(toml, world, "changed", f"{muon}=6")  # the key may stay: muon's own states are loaded
    assert "fresh_optimizer" not in caplog.text
    assert open_checkpoint(toml.parent / "changed" / "checkpoints").state["optimizer_steps"] == 4


@pytest.fixture
def local(world: Intracomm, toml: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("HPCMP_NODES", NODES[world.size])
    yield f"layout.{LAYOUT[world.size]} checkpoint.local_every=2 checkpoint.local={toml.parent}/node{{node}}"


def folders(toml: Path, node: str = "*") -> list[str]:
    return sorted({path.name[:13] for path in toml.parent.glob(f"node{node}/*/step_*")})


def test_a_run_goes_on_from_its_nodes(world: Intracomm, toml: Path, local: str) -> None:
    """Without any ordinary checkpoint; bit for bit; at the end the nodes are left clean."""
    run(toml, world, "whole", f"layout.{LAYOUT[world.size]}")
    crash(toml, world, "local", 5, local)
    assert folders(toml) == ["step_00000002", "step_00000004"]
    world.Barrier()
    if world.rank == 0 and world.size > 1:
        shutil.rmtree(toml.parent / "node0")
    world.Barrier()
    assert crash(toml, world, "local", 5, local) == 4
    world.Barrier()
    run(toml, world, "local", local)
    world.Barrier()
    assert folders(toml) == [] and not (world.rank and list((toml.parent / "local").glob("nothing")))
    if world.rank == 0:
        assert_same(toml, "whole", "local")


def test_the_newest_of_both_kinds_is_taken(world: Intracomm, toml: Path, local: str) -> None:
    both = f"{local} checkpoint.every=3"
    crash(toml, world, "both", 3, both)
    assert folders(toml) == ["step_00000002"]
    assert crash(toml, world, "both", 4, both) == 3  # the ordinary one is newer
    assert crash(toml, world, "both", 5, both) == 4
    world.Barrier()
    if world.rank == 0:
        for node in toml.parent.glob("node*"):
            shutil.rmtree(node)
    world.Barrier()
    assert crash(toml, world, "both", 5, both) == 3


@pytest.mark.parametrize("every", ["none", "3"])
def test_damaged_copies_are_passed_over(
    world: Intracomm, toml: Path, local: str, every: str, caplog: pytest.LogCaptureFixture
) -> None:
    """For the ordinary checkpoint before them; or, where there is none, for the beginning."""
    given = f"{local} checkpoint.every={every}"
    run(toml, world, "whole", f"layout.{LAYOUT[world.size]}")
    crash(toml, world, "damaged", 5, given)
    world.Barrier()
    if world.rank == 0:
        for path in toml.parent.glob("node*/*/step_*/rank_00000.h5"):
            content = np.fromfile(path, np.uint8)
            content[len(content) // 2] ^= 1
            content.tofile(path)
    world.Barrier()
    assert crash(toml, world, "damaged", 1 if every == "none" else 4, given) == (0 if every == "none" else 3)
    assert ("trying the one before" in caplog.text) is (world.rank == 0)
    run(toml, world, "damaged", given)
    if world.rank == 0:
        assert_same(toml, "whole", "damaged")


def test_a_run_that_begins_anew_takes_nothing_from_the_nodes(world: Intracomm, toml: Path, local: str) -> None:
    crash(toml, world, "anew", 5, local)
    assert crash(toml, world, "anew", 1, local, "checkpoint.resume=false") == 0
    assert crash(toml, world, "anew", 1, local) == 0


def test_a_full_node_does_not_end_the_run(
    world: Intracomm, toml: Path, local: str, caplog: pytest.LogCaptureFixture
) -> None:
    if world.rank == 0:
        (toml.parent / "node0").write_text("no directory")
    world.Barrier()
    assert run(toml, world, "full", local)["step"] == 6
    assert caplog.text.count("no more local checkpoints") == (world.rank == 0)


def test_half_of_the_keys_is_refused(toml: Path) -> None:
    for half in ("checkpoint.local=/dev/shm", "checkpoint.local_every=2"):
        with pytest.raises(InputError, match=r"checkpoint.local and checkpoint.local_every need each other"):
            load_config(toml, [half])
