"""A whole run of a model with experts: the same on every layout, resumed on any, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hpcmp.training.config import load_config
from hpcmp.training.trainer import Trainer
from tests.corpus import config, corpus

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

EXPERTS = (
    "model.experts=8 model.expert_ffn=9 model.experts_every=2 model.shared_experts=1 model.capacity=1.0 "
    "train.dtype=float64 run.evaluate_samples=5"
)

#: For each number of ranks the layout that a run begins on, and the one that it goes on with. 5 samples on 8 replicas.
PAIRS = {
    1: ("layout.dp=1", "layout.recompute=full"),
    2: ("layout.ep=2", "layout.tp=2"),
    3: ("layout.ep=3", "layout.cp=3 layout.ep=3"),
    4: ("layout.ep=2 layout.zero=1", "layout.tp=2 layout.ep=2"),
    8: ("layout.ep=8", "layout.tp=2 layout.pp=2 layout.ep=2 layout.schedule=1f1b"),
}


@pytest.mark.mpi
def test_a_run_that_goes_on_with_another_layout_is_the_serial_one(world: Intracomm, mpi_tmp_path: Path) -> None:
    if world.rank == 0:
        config(mpi_tmp_path, corpus(mpi_tmp_path))
    world.Barrier()

    def run(name: str, comm: Any, *overrides: str) -> dict[str, Any]:
        given = [f"run.directory={mpi_tmp_path / name}", *(o for text in (EXPERTS, *overrides) for o in text.split())]
        with Trainer(load_config(mpi_tmp_path / "tiny.toml", given), comm) as trainer:
            return trainer.train()

    first, then = PAIRS[world.size]
    run("spread", world, first, "train.steps=3")
    found = run("spread", world, then)
    if world.rank:
        return
    expected = run("serial", None)
    for key in ("loss", "held_out_loss"):
        assert found[key] == pytest.approx(expected[key], rel=1e-9), key
    files = ((mpi_tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("spread", "serial"))
    spread, serial = ([line for line in map(json.loads, text) if "norm" in line] for text in files)
    assert len(spread) == len(serial) == 6
    for here, there in zip(spread, serial, strict=True):
        for key in ("loss", "norm", "balance", "z", "dropped"):
            assert here[key] == pytest.approx(there[key], rel=1e-9), key
    assert 1 < serial[0]["balance"] < 8 and 0 < serial[0]["dropped"] < 1 and serial[0]["z"] > 0
