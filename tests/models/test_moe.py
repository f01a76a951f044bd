"""Models with experts: which blocks have them, how many numbers they have, and what a token costs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest

from hpcmp import kernels, wgrad
from hpcmp.arrays import Array
from hpcmp.layers.parallel import ModelParallel
from hpcmp.models.architecture import Architecture
from hpcmp.models.transformer import build


def sparse(style: Any, **changes: Any) -> Architecture:
    a = Architecture(style, 5, 10, 6, 3, 4, 7, 13, 16, experts=6, experts_every=2, experts_per_token=2, expert_ffn=9)
    return dataclasses.replace(a, **changes)


def test_the_last_of_every_so_many_blocks_has_experts() -> None:
    names = [p.name for p in build(sparse("gpt")).parameters()]
    assert {name.split("/")[1] for name in names if "mixture" in name} == {"1", "3"}
    assert {name.split("/")[1] for name in names if "mlp/up" in name} == {"0", "2", "4"}
    assert sparse("gpt").expert_layers == 2
    assert not any("mixture" in p.name for p in build(sparse("gpt", experts=0)).parameters())


@pytest.mark.parametrize(("style", "bias", "shared"), [*itertools.product(["gpt", "llama"], [False, True], [0, 2])])
def test_the_number_of_parameters(style: str, bias: bool, shared: int) -> None:
    a = sparse(style, bias=bias, shared_experts=shared)
    sizes = {p.name: math.prod(p.shape) for p in build(a).parameters()}
    assert a.parameters == sum(sizes.values())
    idle = sum(size * 4 // 6 for name, size in sizes.items() if "/experts/" in name)
    assert a.active_parameters == a.parameters - idle


@pytest.mark.parametrize(("style", "shared"), [("gpt", 0), ("llama", 0), ("llama", 2)])
def test_flops_are_those_of_the_matrix_products(style: str, shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted as they are computed: a token multiplies with its own experts alone."""
    a = sparse(style, bias=False, shared_experts=shared)
    counted = 0

    def count(name: str) -> None:
        right = getattr(kernels.CPU, name)

        def kernel(*args: Array) -> Any:
            nonlocal counted
            x, w = (args[1], args[2]) if name == "add_outer" else args[:2]
            counted += 2 * x.size * (w.shape[0] if name == "matmul_transposed" else w.shape[-1])
            return right(*args)

        monkeypatch.setattr(kernels.CPU, name, kernel)

    for name in ("matmul", "matmul_transposed", "add_outer"):
        count(name)
    parallel = ModelParallel()
    parallel.cursor.place = dataclasses.replace(parallel.cursor.place, length=5)
    model = build(a, parallel)
    norms = sum(p.data.size for p in model.initialise(0) if p.data.ndim == 1)
    y, saved = model.forward(np.arange(10).reshape(5, 2))
    model.backward(y, saved, wgrad.now)
    attention = 6 * a.layers * a.heads * a.head_size * 5
    assert a.flops_per_token(5) - 6 * norms - attention == counted / y[..., 0].size
