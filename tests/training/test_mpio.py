"""A run whose checkpoints are written through MPI-IO: it resumes from them, and is the run that it would be without."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hpcmp.checkpoint import checkpoints, open_checkpoint
from hpcmp.training.config import load_config
from hpcmp.training.trainer import Trainer
from tests.corpus import config, corpus

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


@pytest.mark.mpi(size=2)
@pytest.mark.mpio
@pytest.mark.timeout(300)
def test_a_run_saves_through_mpi_io(world: Intracomm, mpi_tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if world.rank == 0:
        config(mpi_tmp_path, corpus(mpi_tmp_path))
    world.Barrier()
    mpio = "checkpoint.storage=mpio checkpoint.every=2 checkpoint.asynchronous=true checkpoint.hints=cb_nodes=1"

    def run(name: str, *given: str) -> None:
        words = [f"run.directory={mpi_tmp_path / name}", "layout.tp=2"]
        words += [word for text in given for word in text.split()]
        with Trainer(load_config(mpi_tmp_path / "tiny.toml", words), world) as trainer:
            trainer.train()
        world.Barrier()

    run("files", "checkpoint.storage=files")
    run("mpio", mpio, "train.steps=3")
    told = [r.getMessage() for r in caplog.records if "all ranks write together: steps wait" in r.getMessage()]
    assert len(told) == (world.rank == 0)
    place = mpi_tmp_path / "mpio" / "checkpoints"
    assert [open_checkpoint(p).manifest.storage for p in checkpoints(place)] == ["mpio", "mpio"]
    assert open_checkpoint(place).step == 3
    run("mpio", mpio)
    one, other = (open_checkpoint(mpi_tmp_path / name / "checkpoints") for name in ("files", "mpio"))
    assert (other.step, other.manifest.storage, other.verify()) == (6, "mpio", [])
    assert one.tensors == other.tensors
    assert [name for name in one.tensors if one.read(name).tobytes() != other.read(name).tobytes()] == []
    world.Barrier()
