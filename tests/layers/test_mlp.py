"""The feed-forward layer whose GELU is part of its products: the layers that it is made of, bit for bit, and all that
is asked of a layer."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp import kernels, wgrad
from hpcmp.arrays import Array, dtype_of
from hpcmp.comm.mesh import Mesh
from hpcmp.layers.activation import GELU
from hpcmp.layers.linear import ColumnParallelLinear, Output, RowParallelLinear
from hpcmp.layers.mlp import GELUDown, GELUUp, fuse
from hpcmp.layers.norm import LayerNorm
from hpcmp.layers.parallel import ModelParallel
from hpcmp.layers.products import LinearProducts, Products
from hpcmp.module import Module, Parameter, Residual, Sequential, normal
from hpcmp.testing import equals_serial
from tests.test_recompute import kept

from .common import Case, draw, place

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

STD = normal(0.3)


def block(p: ModelParallel, f: int, bias: bool = True, hidden: int = 6) -> Sequential:
    """A block of an MLP alone, as ``models.transformer.block`` names its layers."""
    mlp = Residual(
        norm=LayerNorm(p, hidden),
        up=ColumnParallelLinear(p, hidden, {"weight": Output((f,))}, bias=bias, initial=STD),
        activation=GELU(),
        down=RowParallelLinear(p, (f,), hidden, bias=bias, initial=STD),
    )
    return Sequential(mlp=mlp)


CASES = {
    "mlp": Case(lambda p: fuse(block(p, 77))),
    "mlp without biases": Case(lambda p: fuse(block(p, 16, bias=False))),
    "mlp of fewer than the ranks": Case(lambda p: fuse(block(p, 3))),
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
@pytest.mark.parametrize("name", CASES)
def test_gradients_on_ranks(parallel: ModelParallel, name: str) -> None:
    CASES[name].check_gradients(parallel)


def results(module: Module, x: Array, dtype: Any, queued: bool) -> dict[str, Array]:
    """Of a forward and a backward: what it makes, what it keeps, and the gradient of every parameter."""
    parameters = module.initialise(3, dtype)
    for p in parameters:
        p.data += draw(*p.data.shape).astype(dtype)  # biases, too
    queue = wgrad.Queue()
    y, saved = module.forward(x.astype(dtype))
    found = {"y": y, "kept": np.array(sum(kept(saved).values()))}
    found["dx"] = module.backward(draw(*y.shape).astype(dtype), saved, queue if queued else wgrad.now)
    queue.flush()
    return found | {p.name: p.grad for p in parameters}


@pytest.mark.mpi
@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["auto", "reference"])
def test_the_bits_are_those_of_the_layers_that_it_is_made_of(
    parallel: ModelParallel, kind: str, dtype: str, queued: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_kind", kind)
    x = draw(parallel.cursor.place.length, 2, 6)[parallel.positions()]
    plain, fused = block(parallel, 200), fuse(block(parallel, 200))
    wanted, found = (results(module, x, dtype_of(dtype), queued) for module in (plain, fused))
    assert list(found) == list(wanted)  # names and their order
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_the_memory_at_its_highest_is_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_kind", "reference")
    x, peaks = draw(64, 8, 6), []
    for make in (block, lambda p, f: fuse(block(p, f))):
        module = make(place(64), 512)
        module.initialise(0, np.float64)
        y, saved = module.forward(x)
        tracemalloc.start()
        module.backward(np.ones_like(y), saved, wgrad.now)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] <= peaks[0] * 1.001


def kinds(module: Module) -> list[type]:
    found = [type(item) for _, item in module.members() if isinstance(item, Module)]
    return found + [kind for _, item in module.members() if isinstance(item, Module) for kind in kinds(item)]


def test_which_layers_are_fused() -> None:
    """Those of a GELU, by name and exact type, that multiply plainly; another kind of linear is left alone."""

    class Other(ColumnParallelLinear):
        pass

    class EachItsOwn(Products):
        def linear(self, weights: Sequence[Parameter], rows: int) -> LinearProducts:
            return LinearProducts()

    p = place(5)
    assert not {GELUUp, GELUDown} & set(kinds(fuse(block(ModelParallel(products=EachItsOwn()), 8))))
    assert {GELUUp, GELUDown} <= set(kinds(fuse(block(p, 8))))
    without = block(p, 8)
    without.layers["mlp"].layers["up"] = Other(p, 6, {"weight": Output((8,))})
    assert not {GELUUp, GELUDown} & set(kinds(fuse(without)))
    del without.layers["mlp"].layers["activation"]
    assert not {GELUUp, GELUDown} & set(kinds(fuse(without)))


def test_the_weight_gradient_of_down_comes_first() -> None:
    """It frees the gelu's result before the product of dz, and buckets are complete in the order of the backward."""
    module, order = fuse(block(place(5), 8)), []
    module.initialise(0, np.float64)
    y, saved = module.forward(draw(5, 2, 6))
    module.backward(y, saved, lambda fn, *args: order.append(type(fn.__self__)))
    assert order == [GELUDown, GELUUp, LayerNorm]


@pytest.mark.mpi
@pytest.mark.parametrize("sequence", [False, True])
def test_with_tp_y_the_layers_stay_apart(world: Intracomm, sequence: bool) -> None:
    """Where their sums stand between; and tp alone is fused."""
    x = draw(13, 2, 6)
    for y in (y for y in range(1, world.size + 1) if world.size % y == 0):
        with Mesh(world, tp=world.size // y, tp_y=y) as mesh:
            p = ModelParallel(mesh["tp"], place(13).cursor, sequence=sequence, tp_y=mesh["tp_y"])
            made = fuse(block(p, 7))
            assert (GELUUp in kinds(made)) == (y == 1)
            equals_serial(lambda p: fuse(block(p, 7)), p, x, mesh=mesh)
