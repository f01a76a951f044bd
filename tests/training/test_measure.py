"""Blocks shared by what they cost on this machine: alike on every rank, kept with the run, and nothing else moves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.comm.mesh import Mesh
from hpcmp.layers.parallel import ModelParallel
from hpcmp.training import engine as engine_module
from hpcmp.training.config import load_config
from hpcmp.training.engine import architecture
from hpcmp.training.measure import Costs, measure, measured_before, measured_stages
from hpcmp.training.trainer import Trainer
from tests.corpus import config, corpus
from tests.layouts import assert_serial, engine, small, spread

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


def test_what_costs_more_is_measured_as_more() -> None:
    """A head with a large vocabulary, blocks that are the larger for what ``kind`` says; each kind is timed once."""
    a = architecture(small(layers=4, hidden=64, vocabulary=20000, ffn=64, sequence=32))
    parallel = ModelParallel()
    place = parallel.cursor.place
    asked: list[int] = []

    def wrap(block: Any, i: int) -> Any:
        asked.append(i)
        return block

    costs = measure(a, parallel, 2, np.dtype(np.float32), "cpu", wrap, lambda i: i // 3)
    assert asked == [0, 3] and len(costs.blocks) == 4 and costs.blocks[0] == costs.blocks[1] == costs.blocks[2]
    assert costs.last > 3 * max(costs.blocks) and costs.last > costs.first > 0 < min(costs.blocks)
    assert parallel.cursor.place is place


@pytest.mark.mpi
def test_rank_0_decides(world: Intracomm) -> None:
    with Mesh(world, pp=world.size) as mesh:
        mine = Costs([1.0] * 8, 4.0, 0.0) if mesh.rank == 0 else Costs([1.0] * 8, 0.0, 4.0)
        assert measured_stages(mesh, 2, mine) == "2+6"


@pytest.mark.mpi
def test_measured_stages_are_the_serial_model(world: Intracomm) -> None:
    """And the configuration of the engine says which they are, the same on every rank."""
    pp = {1: 1, 2: 2, 3: 3, 4: 2, 8: 4}[world.size]
    made = spread(small(layers=5, dropout=0.1, microbatch=2), f"pp={pp},tp={world.size // pp},stages=measured")
    with engine(made, world) as e:
        stages = e.config.layout.stages
        assert world.allgather(stages) == [stages] * world.size
        assert sum(map(int, stages.split("+"))) == 5 and len(stages.split("+")) == pp
        assert e.config.layout.blocks(5) == tuple(map(int, stages.split("+")))
    assert_serial([made], world)


@pytest.mark.mpi(size=1)
@pytest.mark.mpi(size=2)
@pytest.mark.mpi(size=3)
def test_a_continued_run_keeps_its_stages(
    world: Intracomm, mpi_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other measurements, such as those of another machine, do not move them; on another layout they are new."""
    if world.rank == 0:
        config(mpi_tmp_path, corpus(mpi_tmp_path))
    world.Barrier()
    given = [f"run.directory={mpi_tmp_path / 'run'}", "model.layers=3", "layout.dp=none", "layout.stages=measured"]
    costs = [Costs([1.0] * 3, 0.0, 5.0)]
    monkeypatch.setattr(engine_module, "measure", lambda *_: costs[0])

    def stages(*more: str) -> str:
        with Trainer(load_config(mpi_tmp_path / "tiny.toml", [*given, *more]), world) as trainer:
            trainer.train()
        written = load_config(mpi_tmp_path / "run" / "config.toml").layout
        assert written == trainer.config.layout == trainer.engine.config.layout
        return str(trainer.config.layout.stages)

    pp = 2 if world.size % 2 == 0 else world.size
    virtual = ["layout.schedule=interleaved", "layout.virtual=2", f"layout.pp={pp}"]
    first = stages("train.steps=1", *virtual)
    assert first.endswith("+0")
    costs[0] = Costs([1.0] * 3, 5.0, 0.0)
    assert stages("train.steps=2", *virtual) == first
    assert stages("train.steps=3", *virtual, "layout.virtual=3").startswith("0+")


def test_what_does_not_fit_is_measured_anew(tmp_path: Path) -> None:
    wanted = small(pp=2, stages="measured", layers=5)
    with Mesh() as mesh:
        assert measured_before(wanted, mesh, None) == wanted
        for then, fits in [({"pp": 2, "stages": "4+1"}, True), ({"pp": 2, "stages": "3+1", "layers": 4}, False)]:
            (tmp_path / "config.toml").write_text(small(**{"layers": 5} | then).to_toml())
            found = measured_before(wanted, mesh, tmp_path / "config.toml").layout.stages
            assert found == (then["stages"] if fits else "measured")
        (tmp_path / "config.toml").write_text("no TOML")
        assert measured_before(wanted, mesh, tmp_path / "config.toml") == wanted
        given = small(pp=2, stages="1+4", layers=5)
        assert measured_before(given, mesh, tmp_path / "config.toml") == given
