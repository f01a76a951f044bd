"""``verify`` of models with experts: every layout gives the serial model's numbers, the router's losses included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.errors import InputError
from hpcmp.training.config import Config
from hpcmp.training.state import load_slabs, save_slabs
from hpcmp.training.verify import source_of, verify
from tests.layouts import engine, small, spread

from .test_verify import assert_serial

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

MOE: dict[str, Any] = {
    "experts": 5,
    "experts_per_token": 2,
    "expert_ffn": 7,
    "balance_loss": 2.0,  # enough to show in every gradient
    "z_loss": 0.5,
    "batch": 7,
    "layers": 2,
}
STYLES: dict[str, dict[str, Any]] = {
    "gpt": MOE | {"style": "gpt", "dropout": 0.1, "microbatch": 2},
    "llama": MOE | {"style": "llama", "router": "sigmoid", "shared_experts": 2, "capacity": 1.0, "microbatch": 3},
    "every second": MOE | {"experts_every": 2, "experts_per_token": 1, "layers": 3, "shared_experts": 1},
}

LAYOUTS = {
    1: ["dp=1", "dp=1,recompute=full"],
    2: ["dp=2,ep=2", "cp=2,ep=2", "cp=2,ulysses=2,ep=2", "tp=2", "dp=2,ep=2,recompute=full"],
    3: ["dp=3,ep=3", "cp=3,ep=3"],
    4: [
        "dp=4,ep=2",
        "dp=4,ep=4,recompute=full",
        "dp=2,tp=2,ep=2",
        "dp=2,tp=2,sp=0,ep=2",
        "pp=2,dp=2,ep=2,schedule=1f1b",
        "pp=2,dp=2,ep=2,schedule=zb-h1",
        "dp=2,cp=2,ep=4",
        "cp=2,tp=2,ep=2",
        "dp=4,ep=2,zero=1",
        "dp=4,ep=2,zero=3",
        "dp=2,tp_z=2,ep=4",
    ],
    8: ["dp=2,tp=2,pp=2,ep=2,schedule=zb-h1", "dp=2,cp=2,tp=2,ep=4"],
}


@pytest.mark.mpi
@pytest.mark.parametrize("style", STYLES)
def test_layouts(world: Intracomm, style: str) -> None:
    """Every one where there are few, else every second, in turn."""
    config, texts = small(**STYLES[style]), LAYOUTS[world.size]
    texts = texts if len(texts) < 6 else texts[list(STYLES).index(style) :: 2]
    assert_serial([spread(config, text) for text in texts], world)


@pytest.mark.mpi
def test_a_step_reports_the_routers_losses(world: Intracomm) -> None:
    """Even weights of the router: a balance of 1 and z = log(experts)^2, whatever the layout; and what is dropped."""
    config = spread(small(**MOE, capacity=0.4, microbatch=2), f"dp={world.size}")
    with engine(config, world) as e:
        for p in e.buckets.parameters:
            if p.name.endswith("router/weight"):
                p.data[...] = 0
        result = e.step(0, *source_of(config)(0, e.share))
    assert result.z == pytest.approx(np.log(5) ** 2, rel=1e-12)
    assert result.balance == pytest.approx(1, rel=1e-12)
    assert result.dropped == pytest.approx(0.8)  # all choose experts 0 and 1: 1 of 5 positions has room
    assert world.allgather(result) == [result] * world.size


def test_verify_compares_the_routers_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    from hpcmp.layers.moe.router import Router

    right = Router._count

    def count(self: Any, *args: Any) -> None:
        right(self, *args)
        if self.parallel.cursor.place.samples.size < 7:  # the serial run has one microbatch
            self.parallel.cursor.losses["z"] += 1

    monkeypatch.setattr(Router, "_count", count)
    config = small(**MOE, microbatch=2)
    (report,) = verify([config], None, source_of(config))
    assert report.loss > 1e-3 and max(max(p.gradient, p.weight) for p in report.parameters) < 1e-12


@pytest.mark.mpi
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_evaluation_with_shares_of_any_size(world: Intracomm, batch: int) -> None:
    """Ranks whose replicas have fewer samples, or none, take part in every exchange of the others' tokens."""
    config = spread(small(**MOE | {"experts": 8, "microbatch": 1}), f"dp={world.size},ep={world.size}")
    losses = []
    for c, comm in ((config, world), (small(**MOE | {"experts": 8, "microbatch": 1}), None)):
        with engine(c, comm) as e:
            share = e.mesh["dp"].part(batch)
            losses.append(e.evaluate(*source_of(config)(0, share), batch=batch))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.mpi
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_checkpoint_holds_every_expert_once(world: Intracomm, zero: int) -> None:
    """Over all ranks, what is written tiles every tensor, moments included."""
    ep = world.size if world.size % 2 else world.size // 2  # with copies of experts, where the ranks are even
    with engine(spread(small(**MOE | {"experts": 8}), f"dp={world.size},ep={ep},zero={zero}"), world) as e:
        written = [(s.name, s.shape, s.index) for s in save_slabs(e, "") if s.name != "tokenizer"]
        read = {s.name for s in load_slabs(e)}
    counts: dict[str, Any] = {}
    for name, shape, index in (slab for slabs in world.allgather(written) for slab in slabs):
        counts.setdefault(name, np.zeros(shape, int))[index] += 1
    assert read <= set(counts)
    assert "optimizer/m/blocks/1/mlp/mixture/experts/down" in counts
    assert {name for name, count in counts.items() if (count != 1).any()} == set()


@pytest.mark.parametrize(
    ("model", "layout", "message"),
    [
        ({"experts": 3}, {"dp": 4, "ep": 4}, "layout.ep = 4 is more than model.experts = 3; ep=2 would fit"),
        ({}, {"dp": 2, "ep": 2}, "layout.ep = 2 is more than model.experts = 0; ep=1 would fit"),
        ({"experts": 4}, {"tp": 3, "tp_y": 2}, r"layout.tp_y = 2 does not cut experts .*; tp_y=1,tp=6 would fit"),
        ({"experts": 4, "experts_every": 5}, {}, "experts_every = 5: none of model.layers = 4 blocks has experts"),
        ({"experts": 1}, {}, "experts_per_token = 2 is more than model.experts = 1"),
    ],
)
def test_what_does_not_fit_is_said(model: dict[str, Any], layout: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Config.from_dict({"model": model, "layout": layout}).resolved()
