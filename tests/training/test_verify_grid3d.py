"""Whole models on 3-D grids, tp x tp_y x tp_z, give the serial model's numbers; and what a layout may say of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.checkpoint import open_checkpoint, save
from hpcmp.comm.mesh import Mesh
from hpcmp.errors import InputError
from hpcmp.training.config import Layout
from hpcmp.training.state import load_slabs, save_slabs
from hpcmp.training.verify import source_of, verify
from tests.layouts import engine, small, spread

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

LIMIT = 1e-12  # of float64's 2e-16; measured: a few 1e-15

#: By the number of ranks, so that every number runs what the smaller ones have not.
LAYOUTS = {
    1: [],
    2: ["tp_y=2", "tp_y=2,recompute=full,micro=2", "tp_z=2"],
    3: ["tp_y=3,micro=2"],
    4: [
        "tp=2,tp_y=2",
        "tp=2,tp_y=2,sp=1,recompute=full",
        "tp_y=4,micro=2",
        "tp_y=2,pp=2,micro=2",
        "tp_y=2,dp=2",
        "tp_y=2,tp_z=2",
        "tp=2,tp_z=2,sp=1,micro=1",
    ],
    8: [
        "tp=2,tp_y=2,tp_z=2,sp=1",
        "tp=2,tp_y=2,tp_z=2,micro=1,recompute=full",
        "tp=2,tp_y=2,pp=2,sp=1,schedule=zb-h1,micro=1",
        "tp=2,tp_y=2,dp=2",
        "tp=4,tp_y=2,sp=1",
        "tp=2,tp_y=4,sp=1",
        "tp_y=8",
        "tp=2,tp_y=3,sp=1",
    ],
}

CASES: dict[str, dict[str, Any]] = {
    "gpt": {"style": "gpt", "hidden": 5, "dropout": 0.1, "tied": True},
    "llama": {"style": "llama", "hidden": 7, "dropout": 0.1, "bias": True},
    "fewer of everything than ranks": {
        "style": "gpt", "layers": 2, "hidden": 3, "heads": 2, "kv_heads": 1, "vocabulary": 3, "ffn": 3, "sequence": 3,
        "batch": 3, "tied": True,
    },
}  # fmt: skip


@pytest.mark.mpi
@pytest.mark.timeout(180)
@pytest.mark.parametrize("case", CASES)
def test_every_grid_is_the_serial_model(world: Intracomm, case: str) -> None:
    config = small(**CASES[case])
    texts = LAYOUTS[world.size]
    reports = verify([spread(config, text) for text in texts], world, source_of(config)) if texts else []
    assert {report.layout: report.worst for report in reports if not report.worst <= LIMIT} == {}


@pytest.mark.mpi(min_size=2)
@pytest.mark.timeout(180)
def test_a_checkpoint_of_a_grid_is_read_by_tp_alone(world: Intracomm, mpi_tmp_path: Path) -> None:
    """Trained weights and moments, every number in its place."""
    config, n = small(hidden=5, layers=1, tied=True), world.size
    first = spread(config, {2: "tp_y=2", 3: "tp_y=3", 4: "tp=2,tp_y=2", 8: "tp=2,tp_y=2,tp_z=2"}[n])
    with engine(first, world) as e:
        e.step(0, *source_of(first)(0, e.share))
        save(mpi_tmp_path, 1, save_slabs(e, "{}"), {}, e.mesh)
    wholes = {}
    with Mesh() as mesh:
        checkpoint = open_checkpoint(mpi_tmp_path, mesh)
        for name in checkpoint.tensors:
            wholes[name] = checkpoint.read(name)
    with engine(spread(config, f"tp={n}"), world) as e:
        slabs = load_slabs(e)
        open_checkpoint(mpi_tmp_path, e.mesh).load(slabs)
        for slab in slabs:
            np.testing.assert_array_equal(slab.data, wholes[slab.name][slab.index])


def test_z_shares_the_weights() -> None:
    """Zero is 3, over tp_z by default, or over more ranks."""

    def found(text: str) -> tuple[int, int | None]:
        layout = spread(small(), text).layout
        assert layout == layout.resolved()
        return layout.zero, layout.zero_group

    assert found("tp_z=2") == found("tp_z=2,zero=3") == (3, 2)
    assert found("tp_z=2,dp=2,zero_group=4") == (3, 4)
    assert found("tp_y=2") == (0, None)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tp_z=2, zero=1), r"layout.zero = 1: layout.tp_z = 2 shares the weights; 3 would fit"),
        (Layout(tp_z=2, zero=2), r"layout.zero = 2: .*; 3 would fit"),
        (Layout(tp_z=2, zero_group=3), r"layout.zero_group = 3 is no multiple of layout.tp_z = 2.*; 2 would fit"),
        (Layout(tp_y=4), r"layout.tp x layout.tp_y x layout.pp = 4 does not divide the 6 ranks; .* would fit"),
    ],
)
def test_layouts_that_do_not_fit(layout: Layout, message: str) -> None:
    with pytest.raises(InputError, match=message):
        layout.resolved(6)
