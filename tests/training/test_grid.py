"""A grid of whole models on layouts, each against the serial model in float64: loss, norm, gradients and weights.

A line of ``GRID`` is a model of ``MODELS`` and a layout as ``--layout`` takes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hpcmp.comm.mesh import Mesh
from hpcmp.training.config import Layout, parse_layout
from hpcmp.training.engine import Engine
from tests.layouts import SMALL, assert_serial, engine, small, spread

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

HERE = Path(__file__).parent

#: Sizes that no number of ranks divides; five layers for pipelines, five samples for replicas; dropout everywhere.
ODD: dict[str, Any] = SMALL | {"layers": 5, "hidden": 10, "sequence": 11, "batch": 5, "dropout": 0.1}
MOE: dict[str, Any] = ODD | {"experts": 5, "experts_every": 2, "expert_ffn": 3, "z_loss": 0.1, "balance_loss": 0.1}
MODELS: dict[str, dict[str, Any]] = {
    "gpt": ODD | {"tied": True},
    "llama": ODD | {"style": "llama", "tied": False, "kv_heads": 2, "bias": True},
    # fewer of everything than ranks: layers, heads, vocabulary rows, columns, positions, samples
    "few": ODD | {"layers": 2, "heads": 2, "kv_heads": 1, "vocabulary": 3, "ffn": 3, "sequence": 3, "batch": 2},
    "moe": MOE | {"shared_experts": 1, "experts": 9},
    "dropless": MOE | {"style": "llama", "router": "sigmoid", "experts_every": 1, "experts": 3, "tied": True},
    "capacity": MOE | {"capacity": 1.0, "experts_per_token": 1},
    "sgd": ODD | {"name": "sgd"},
    "lamb": ODD | {"name": "lamb"},
    "muon": ODD | {"name": "muon"},
}

GRID = """
# tensor and sequence parallelism
gpt       tp=2,sp=0
gpt       tp=2,sp=1
llama     tp=3,sp=1
gpt       tp=4,sp=1
few       tp=8,sp=1
llama     tp=8,sp=0
# pipelines: every schedule, with microbatches that do not divide the batch
gpt       pp=2,schedule=gpipe,micro=2
llama     pp=3,schedule=gpipe,micro=1,stages=1+1+3
gpt       pp=2,schedule=1f1b,micro=1
gpt       pp=4,schedule=1f1b,micro=2,stages=1+2+0+2
few       pp=8,schedule=1f1b,micro=1
gpt       pp=2,schedule=interleaved,virtual=2,micro=1
llama     pp=2,schedule=interleaved,virtual=3,micro=2
few       pp=4,schedule=interleaved,virtual=2,micro=1
gpt       pp=2,schedule=zb-h1,micro=1
llama     pp=4,schedule=zb-h1,micro=2
gpt       pp=2,schedule=zb-v,micro=1
llama     pp=3,schedule=zb-v,micro=1,stages=1+0+2+1+0+1
gpt       pp=2,schedule=dualpipe-v,micro=1
few       pp=4,schedule=dualpipe-v,micro=1
gpt       pp=2,schedule=file:{here}/backwards.txt,micro=2
gpt       tp=2,pp=2,schedule=zb-h1,micro=1
gpt       tp=2,pp=2,dp=2,schedule=zb-v,micro=1
llama     tp=2,pp=2,dp=2,schedule=interleaved,virtual=2,micro=1
gpt       tp=2,pp=4,schedule=dualpipe-v,micro=1
gpt       dp=3,pp=2,schedule=1f1b,micro=1
# replicas, and ZeRO over all of them or some
gpt       dp=2
llama     dp=3,micro=1
few       dp=4
gpt       dp=2,zero=1
gpt       dp=2,zero=2,micro=1
gpt       dp=2,zero=3,micro=1
few       dp=8,zero=3
llama     dp=3,zero=2
gpt       dp=4,zero=1,zero_group=2
llama     dp=4,zero=2,zero_group=2,micro=1
llama     dp=8,zero=3,zero_group=4
gpt       dp=2,tp=2,sp=1,zero=1
gpt       dp=2,tp=2,sp=1,zero=3
gpt       dp=2,pp=2,zero=1,schedule=1f1b,micro=1
gpt       dp=2,pp=2,zero=2,schedule=zb-h1,micro=1
gpt       dp=2,pp=2,zero=3,schedule=1f1b,micro=1
gpt       dp=2,tp=2,pp=2,sp=1,zero=2,schedule=1f1b,micro=1
llama     dp=2,pp=2,zero=1,schedule=dualpipe-v,micro=1
# context parallelism: a ring, exchanged heads, both
gpt       cp=2
llama     cp=3
few       cp=4
gpt       cp=2,ulysses=2
llama     cp=4,ulysses=4
gpt       cp=4,ulysses=2
llama     cp=8,ulysses=2
few       cp=8,ulysses=2
gpt       cp=2,tp=2,sp=1
llama     cp=2,ulysses=2,tp=2,sp=0
gpt       cp=2,pp=2,schedule=1f1b,micro=1
llama     cp=2,pp=2,schedule=zb-v,micro=1
gpt       cp=2,dp=2,zero=1
llama     cp=2,dp=2,zero=3,zero_group=2
gpt       cp=4,ulysses=2,tp=2,sp=1
gpt       cp=2,tp=2,pp=2,sp=1,schedule=interleaved,virtual=2,micro=1
# experts
moe       tp=1
capacity  micro=2
moe       tp=2,sp=1
dropless  tp=3,sp=0
moe       dp=2
moe       dp=2,ep=2
dropless  dp=3,ep=3,micro=1
capacity  dp=4,ep=2
moe       dp=8,ep=8
dropless  dp=2,ep=2,tp=2,sp=1
moe       dp=2,ep=2,pp=2,schedule=1f1b,micro=1
moe       pp=2,schedule=zb-h1,micro=1
dropless  cp=2
moe       cp=2,ep=2
capacity  cp=2,dp=2,ep=4
moe       dp=2,ep=2,zero=1
moe       dp=4,ep=2,zero=2,micro=1
dropless  dp=4,ep=2,zero=3
capacity  dp=2,ep=2,tp=2,pp=2,sp=1,schedule=1f1b,micro=1
moe       dp=2,ep=2,recompute=full
# 3-D tensor parallelism
gpt       tp_y=2
gpt       tp_z=2
llama     tp_y=2,tp=2
llama     tp_z=2,tp=2
gpt       tp_y=2,tp_z=2,tp=2
few       tp_y=3
llama     tp_y=2,tp_z=4
gpt       tp_y=2,pp=2,schedule=1f1b,micro=1
gpt       tp_z=2,pp=2,schedule=zb-h1,micro=1
llama     tp_y=2,tp=2,dp=2,zero=1
gpt       tp_y=2,cp=2
# what the backward pass makes again, and what waits in the host's memory
gpt       recompute=full
gpt       recompute=full,recompute_every=2
llama     recompute=attention
gpt       recompute=activations
gpt       tp=2,sp=1,recompute=activations
llama     pp=2,schedule=interleaved,virtual=2,micro=1,recompute=full
gpt       pp=2,schedule=zb-h1,micro=1,recompute=attention
llama     cp=2,recompute=attention
gpt       dp=2,zero=3,recompute=full
llama     offload=activations
gpt       tp=2,offload=activations
gpt       dp=2,zero=2,offload=optimizer
gpt       dp=2,pp=2,schedule=zb-h1,micro=1,offload=both,recompute=full
# other optimizers
sgd       dp=2,tp=2,zero=1
lamb      tp=2,sp=1
lamb      dp=2,pp=2,zero=1,schedule=1f1b,micro=1
lamb      dp=2,tp=2,zero=3
muon      tp=2,sp=1
muon      dp=3,zero=1
muon      dp=2,tp=2,pp=2,zero=2,schedule=1f1b,micro=1
muon      tp_y=2,tp=2
# everything
gpt       dp=2,tp=2,pp=2,cp=2,sp=1,schedule=zb-h1,micro=1,zero=1
llama     dp=2,pp=2,cp=4,ulysses=2,schedule=zb-v,micro=1,zero=2,recompute=attention
moe       dp=2,tp=2,pp=2,cp=2,ep=4,sp=1,schedule=interleaved,virtual=2,micro=1,zero=1
gpt       tp=2,tp_y=2,tp_z=2,pp=2,schedule=1f1b,micro=1,zero=3
dropless  dp=4,tp=4,ep=2,sp=1,zero=3,recompute=full
"""


def lines() -> list[Any]:
    """Every line of the grid as a parameter that runs on the ranks that it needs, or on the next more that other tests
    have."""
    found = []
    for line in GRID.splitlines():
        if line and not line.startswith("#"):
            model, text = line.split()
            ranks = parse_layout(text, Layout()).ranks
            size = min(size for size in (1, 2, 3, 4, 8, 16) if size >= ranks)
            found.append(pytest.param(model, text, marks=pytest.mark.mpi(size=size), id=f"{model}:{text}"))
    return found


@pytest.mark.parametrize(("model", "text"), lines())
def test_the_layout_gives_the_serial_models_numbers(world: Intracomm, model: str, text: str) -> None:
    config = spread(small(**MODELS[model]), text.format(here=HERE))
    idle = world.rank >= config.layout.ranks
    part = world.Split(idle, world.rank)
    if not idle:
        assert_serial([config], part)
    part.Free()


def test_the_models_are_what_their_names_say() -> None:
    with engine(small(**MODELS["moe"])) as e:
        assert any("experts" in p.name for p in e.buckets.parameters)
    kinds = {name: type(made.optimizer) for name in MODELS for made in [Engine(small(**MODELS[name]), Mesh())]}
    assert len({kinds[name] for name in ("gpt", "sgd", "lamb", "muon")}) == 4
