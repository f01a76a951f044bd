"""GELU and SwiGLU, and the feed-forward layers that they stand in."""

from __future__ import annotations

import pytest

from hpcmp.layers.activation import GELU, SwiGLU
from hpcmp.layers.linear import ColumnParallelLinear, Output, RowParallelLinear
from hpcmp.layers.norm import LayerNorm, RMSNorm
from hpcmp.layers.parallel import ModelParallel
from hpcmp.module import Module, Recompute, Residual, normal

from .common import Case

STD = normal(0.3)


def gelu_mlp(p: ModelParallel, f: int) -> Module:
    return Residual(
        LayerNorm(p, 6),
        ColumnParallelLinear(p, 6, {"weight": Output((f,))}, bias=True, initial=STD),
        GELU(),
        RowParallelLinear(p, (f,), 6, bias=True, initial=STD),
    )


def swiglu_mlp(p: ModelParallel, f: int) -> Module:
    return Residual(
        RMSNorm(p, 6),
        ColumnParallelLinear(p, 6, {"weight": Output((2, f), axis=1)}, initial=STD),
        SwiGLU(),
        RowParallelLinear(p, (f,), 6, initial=STD),
    )


CASES = {
    "gelu": Case(lambda p: GELU(), layout="VV"),
    "swiglu": Case(lambda p: SwiGLU(), (2, 7), "VV"),
    "gelu mlp": Case(lambda p: gelu_mlp(p, 77)),
    "swiglu mlp": Case(lambda p: swiglu_mlp(p, 77)),
    "gelu mlp of fewer than the ranks": Case(lambda p: gelu_mlp(p, 3)),
    "swiglu mlp of fewer than the ranks, recomputed": Case(lambda p: Recompute(swiglu_mlp(p, 3))),
}


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    CASES[name].check_serial()
    CASES[name].check_dtype()
    CASES[name].check_weight_gradients()


@pytest.mark.mpi
@pytest.mark.parametrize("name", CASES)
def test_layouts(parallel: ModelParallel, name: str) -> None:
    CASES[name].check_equal(parallel)


@pytest.mark.mpi
def test_gradients_on_ranks(parallel: ModelParallel) -> None:
    CASES["swiglu mlp of fewer than the ranks, recomputed"].check_gradients(parallel)
