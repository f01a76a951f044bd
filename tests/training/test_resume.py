"""Going on with everything a run is made of: on another precision, with another optimizer, from the nodes' copies."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.checkpoint import open_checkpoint
from hpcmp.data.prepare import prepare
from hpcmp.errors import InputError
from hpcmp.training.config import load_config
from hpcmp.training.trainer import Trainer
from tests.corpus import config

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.timeout(300)

NODES = {1: "0", 2: "0,1", 3: "0,0,1", 4: "0,0,1,1", 8: "0,0,1,1,2,2,3,3"}
LAYOUT = {1: "dp=1", 2: "dp=2", 3: "tp=3", 4: "dp=2 layout.tp=2 layout.zero=1", 8: "dp=2 layout.pp=2 layout.tp=2"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration ``tiny.toml``, in a folder that all ranks share; each test has run directories of its own."""
    from mpi4py import MPI

    folder = tmp_path_factory.mktemp("resume")
    if MPI.COMM_WORLD.rank == 0:  # 15 samples: an epoch ends with the third step
        (folder / "few").mkdir()
        (folder / "few" / "a.txt").write_text("".join(f"{i} times {i} is {i * i}\n" for i in range(22)))
        prepare([folder / "few"], folder / "tokens.h5", held_out=0)
        config(folder, folder / "tokens.h5")
    return Path(MPI.COMM_WORLD.bcast(str(folder)))


@pytest.fixture
def toml(world: Intracomm, place: Path) -> Path:
    world.Barrier()
    return place / "tiny.toml"


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, Any]:
    """The summary of the run "whole", which nothing disturbs: float16, dropout, microbatches, two epochs."""
    from mpi4py import MPI

    given = settings(place / "tiny.toml", "whole", half(MPI.COMM_WORLD))
    with Trainer(load_config(place / "tiny.toml", given), MPI.COMM_WORLD) as trainer:
        assert trainer.inputs.sampler.windows == 15 == 3 * trainer.config.train.batch
        assert trainer.config.model.dropout > 0 and trainer.engine.microbatches() > 1
        return trainer.train()


def half(world: Any) -> str:
    return f"train.dtype=float16 train.loss_scale_window=2 layout.{LAYOUT[world.size]}"


def settings(toml: Path, name: str, *given: str) -> list[str]:
    return [f"run.directory={toml.parent / name}", *(word for text in given for word in text.split())]


def run(toml: Path, world: Any, name: str, *given: str) -> dict[str, Any]:
    """Run to the end; returns when all ranks have."""
    with Trainer(load_config(toml, settings(toml, name, *given)), world) as trainer:
        summary = trainer.train()
    world.Barrier()
    return summary


def crash(toml: Path, world: Any, name: str, steps: int, *given: str) -> int:
    """Run to ``steps`` and end without a checkpoint, as a crash would; returns the step at which it began."""
    with Trainer(load_config(toml, settings(toml, name, *given)), world) as trainer:
        began = trainer.step
        for _ in trainer:
            if trainer.step == steps:
                break
    world.Barrier()
    return began


def tensors(toml: Path, name: str, step: int = 6) -> dict[str, Any]:
    checkpoint = open_checkpoint(toml.parent / name / "checkpoints" / f"step_{step:08d}")
    return {tensor: checkpoint.read(tensor) for tensor in checkpoint.tensors}


def assert_same(toml: Path, a: str, b: str) -> None:
    left, right = tensors(toml, a), tensors(toml, b)
    assert left.keys() == right.keys() and len(left) > 60
    assert [name for name in left if left[name].tobytes() != right[name].tobytes()] == []


@pytest.mark.mpi
def test_bit_for_bit_across_all_that_a_run_counts(world: Intracomm, toml: Path, whole: dict[str, Any]) -> None:
    """Dropout, the loss scale of float16, microbatches, and an epoch of data that ends before, at and after the
    checkpoint."""
    for where in (2, 3, 4):
        assert run(toml, world, "parts", half(world), f"train.steps={where}")["step"] == where
    assert run(toml, world, "parts", half(world))["loss"] == whole["loss"]
    if world.rank == 0:
        assert_same(toml, "whole", "parts")
        states = [open_checkpoint(toml.parent / name / "checkpoints").state for name in ("whole", "parts")]
        for key in ("loss_scale", "sampler", "optimizer_steps"):
            assert states[0][key] == states[1][key], key
        assert states[0]["loss_scale"]["scale"] > 65536


@pytest.mark.mpi(size=2)
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


@pytest.mark.mpi(size=2)
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
def local(world: Intracomm, toml: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The settings of ``half``, and nodes of their own for each test."""
    monkeypatch.setenv("HPCMP_NODES", NODES[world.size])
    nodes = toml.parent / f"{request.node.originalname}-node{{node}}"
    return f"{half(world)} checkpoint.local_every=2 checkpoint.local={nodes}"


def nodes(local: str, node: str = "*") -> list[Path]:
    """The folders of nodes."""
    place = Path(local.rpartition("=")[2])
    return sorted(place.parent.glob(place.name.format(node=node)))


def folders(local: str) -> list[str]:
    """The steps that some node has."""
    return sorted({path.name[:13] for node in nodes(local) for path in node.glob("*/step_*")})


@pytest.mark.mpi(size=8)
def test_a_run_goes_on_from_its_nodes(world: Intracomm, toml: Path, whole: dict[str, Any], local: str) -> None:
    """Without any ordinary checkpoint; bit for bit, also when a node is lost; at the end the nodes are left clean."""
    crash(toml, world, "local", 5, local)
    assert folders(local) == ["step_00000002", "step_00000004"]
    world.Barrier()
    if world.rank == 0:
        shutil.rmtree(*nodes(local, "0"))
    world.Barrier()
    assert crash(toml, world, "local", 5, local) == 4
    run(toml, world, "local", local)
    assert folders(local) == []
    if world.rank == 0:
        assert_same(toml, "whole", "local")


@pytest.mark.mpi(size=2)
def test_the_newest_of_both_kinds_is_taken(world: Intracomm, toml: Path, local: str) -> None:
    both = f"checkpoint.every=3 {local}"
    crash(toml, world, "both", 3, both)
    assert folders(local) == ["step_00000002"]
    assert crash(toml, world, "both", 4, both) == 3  # the ordinary one is newer
    assert crash(toml, world, "both", 5, both) == 4
    if world.rank == 0:
        for node in nodes(local):
            shutil.rmtree(node)
    world.Barrier()
    assert crash(toml, world, "both", 4, both) == 3


@pytest.mark.mpi(size=4)
@pytest.mark.parametrize("every", ["none", "3"])
def test_damaged_copies_are_passed_over(
    world: Intracomm, toml: Path, whole: dict[str, Any], local: str, every: str, caplog: pytest.LogCaptureFixture
) -> None:
    """For the ordinary checkpoint before them; or, where there is none, for the beginning."""
    name, given = f"damaged-{every}", f"checkpoint.every={every} {local}"
    crash(toml, world, name, 4, given)
    if world.rank == 0:
        for path in (path for node in nodes(local) for path in node.glob("*/step_*/rank_00000.h5")):
            content = np.fromfile(path, np.uint8)
            content[len(content) // 2] ^= 1
            content.tofile(path)
    world.Barrier()
    assert crash(toml, world, name, 1 if every == "none" else 4, given) == (0 if every == "none" else 3)
    assert ("trying the one before" in caplog.text) is (world.rank == 0)
    run(toml, world, name, given)
    if world.rank == 0:
        assert_same(toml, "whole", name)


@pytest.mark.mpi(size=2)
def test_a_run_that_begins_anew_takes_nothing_from_the_nodes(world: Intracomm, toml: Path, local: str) -> None:
    crash(toml, world, "anew", 3, local)
    assert crash(toml, world, "anew", 1, local, "checkpoint.resume=false") == 0
    assert crash(toml, world, "anew", 1, local) == 0


@pytest.mark.mpi(size=2)
def test_a_full_node_does_not_end_the_run(
    world: Intracomm, toml: Path, local: str, caplog: pytest.LogCaptureFixture
) -> None:
    if world.rank == 0:
        Path(local.rpartition("=")[2].format(node=0)).write_text("no directory")
    world.Barrier()
    assert run(toml, world, "full", local)["step"] == 6
    assert caplog.text.count("no more local checkpoints") == (world.rank == 0)


def test_half_of_the_keys_is_refused(tmp_path: Path) -> None:
    toml = config(tmp_path, tmp_path / "tokens.h5")
    for half in ("checkpoint.local=/dev/shm", "checkpoint.local_every=2"):
        with pytest.raises(InputError, match=r"checkpoint.local and checkpoint.local_every need each other"):
            load_config(toml, [half])
