"""Column- and row-parallel linears and the head: gradients, every layout, and their definitions without overlap."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcmp import wgrad
from hpcmp.arrays import Array
from hpcmp.layers.heads import Heads
from hpcmp.layers.linear import ColumnParallelLinear, Output, ParallelHead, RowParallelLinear
from hpcmp.layers.parallel import ModelParallel
from hpcmp.module import Module, Sequential, normal
from hpcmp.testing import share
from hpcmp.wgrad import WGrad

from .common import Case, draw, place

STD = normal(0.3)


def column(*shape: int, axis: int = 0, bias: bool = False) -> Case:
    """An output of (S, batch, *shape) with ``axis`` sharded."""

    def build(p: ModelParallel) -> Module:
        return ColumnParallelLinear(p, 6, {"weight": Output(shape, axis)}, bias=bias, initial=STD)

    return Case(build, layout="AV", cut_y=share(2 + axis))


def row(*shape: int, axis: int = 0, bias: bool = False) -> Case:
    """An input of (S, batch, *shape) with ``axis`` sharded."""

    def build(p: ModelParallel) -> Module:
        return RowParallelLinear(p, shape, 6, axis=axis, bias=bias, initial=STD)

    return Case(build, shape, "VA", cut_x=share(2 + axis))


def queries_and_keys(p: ModelParallel, heads: int = 6, kv: int = 3) -> ColumnParallelLinear:
    """Two outputs of one entry, of which the second overlaps between ranks."""
    h = Heads(heads, kv, p.tp.size, p.tp.rank)
    outputs = {
        "query": Output((heads, 4), part=h.queries),
        "key_value": Output((kv, 2, 4), part=h.key_values, owned=h.owned, overlaps=h.overlaps),
    }
    return ColumnParallelLinear(p, 6, outputs, bias=True, initial=STD)


def head(vocabulary: int) -> Case:
    def build(p: ModelParallel) -> Module:
        return ParallelHead(p, p.sharded(vocabulary, 6, axis=0, initial=STD))

    return Case(build, layout="AV", cut_y=share(2))


CASES = {
    "column": column(7),
    "column with bias": column(77, bias=True),
    "column of fewer than the ranks": column(3, bias=True),
    "gate and up": column(2, 7, axis=1, bias=True),
    "row": row(7),
    "row with bias": row(77, bias=True),
    "row of fewer than the ranks": row(3, bias=True),
    "row of heads": row(5, 4, bias=True),
    "row along its second axis": row(2, 7, axis=1),
    "head": head(19),
    "head of fewer than the ranks": head(3),
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
@pytest.mark.parametrize("name", ["gate and up", "row with bias", "head of fewer than the ranks"])
def test_gradients_on_ranks(parallel: ModelParallel, name: str) -> None:
    CASES[name].check_gradients(parallel)


@pytest.mark.mpi
@pytest.mark.parametrize("kv", [3, 1])
def test_gradients_where_shards_overlap(parallel: ModelParallel, kv: int) -> None:
    Case(lambda p: queries_and_keys(p, kv=kv), layout="AV").check_gradients(parallel)


class Linear(Module):
    """y = x W + b on arrays as they are: what each rank of a parallel linear computes, without any communication."""

    def __init__(self, weight: Array, bias: Array | None) -> None:
        self.weight, self.bias = weight, bias
        self.dweight, self.dbias = np.zeros_like(weight), None if bias is None else np.zeros_like(bias)

    def forward(self, x: Array) -> tuple[Array, Array]:
        y = np.einsum("sbi,io->sbo", x, self.weight)
        return y if self.bias is None else y + self.bias, x

    def backward(self, dy: Array, saved: Array, wgrad: WGrad) -> Array:
        self.dweight += np.einsum("sbi,sbo->io", saved, dy)
        if self.dbias is not None:
            self.dbias += dy.sum((0, 1))
        return np.einsum("sbo,io->sbi", dy, self.weight)


def own(rank: int, *shape: int) -> Array:
    return np.random.default_rng((rank, *shape)).normal(size=shape)


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.mpi
@pytest.mark.parametrize("queued", [False, True])
def test_column_is_its_definition(parallel: ModelParallel, queued: bool) -> None:
    """Sequential(enter, Linear) on this rank's columns of each output, although dY differs on every rank."""
    module, queue = queries_and_keys(parallel), wgrad.Queue()
    parameters = {p.name: p for p in module.initialise(0, np.float64)}
    x = draw(parallel.cursor.place.length, 2, 6)[parallel.positions()]
    ys, saved = module.forward(x)
    assert saved is x  # the shard is all that it keeps
    dys = tuple(own(parallel.tp.rank, *y.shape) for y in ys)
    dx = module.backward(dys, saved, queue if queued else wgrad.now)
    queue.flush()
    expected = np.zeros_like(x)
    for name, y, dy in zip(("query", "key_value"), ys, dys, strict=True):
        weight, bias = parameters[name], parameters[f"{name}_bias"]
        linear = Linear(weight.data.reshape(6, bias.data.size), bias.data.reshape(-1))
        plain = Sequential(parallel.enter, linear)
        flat, plain_saved = plain.forward(x)
        close(y.reshape(flat.shape), flat)
        expected += plain.backward(dy.reshape(flat.shape), plain_saved, wgrad.now)
        close(weight.grad.reshape(linear.weight.shape), linear.dweight)
        close(bias.grad.reshape(-1), linear.dbias)
    close(dx, expected)


@pytest.mark.mpi
def test_row_is_its_definition(parallel: ModelParallel) -> None:
    """Sequential(Linear, leave) on this rank's rows, and the bias once."""
    module, rank = RowParallelLinear(parallel, (7,), 6, bias=True, initial=STD), parallel.tp.rank
    weight, bias = module.initialise(0, np.float64)
    bias.data += draw(6)
    plain = Sequential(Linear(weight.data, None), parallel.leave)
    x = own(rank, parallel.cursor.place.length, 2, weight.data.shape[0])
    y, saved = module.forward(x)
    expected, plain_saved = plain.forward(x)
    close(y, expected + bias.data)
    dy = draw(parallel.cursor.place.length, 2, 6)[parallel.positions()]
    close(module.backward(dy, saved, wgrad.now), plain.backward(dy, plain_saved, wgrad.now))
    linear = plain.layers["0"]
    assert isinstance(linear, Linear)
    close(weight.grad, linear.dweight)
    close(bias.grad, dy.sum((0, 1)))


def test_which_parameters_decay_and_what_they_are_called() -> None:
    module = queries_and_keys(place(5))
    assert {p.name: p.decay for p in module.parameters()} == {
        "query": True,
        "key_value": True,
        "query_bias": False,
        "key_value_bias": False,
    }
    row = RowParallelLinear(place(5), (7,), 6, bias=True)
    assert {p.name: p.decay for p in row.parameters()} == {"weight": True, "bias": False}


@pytest.mark.mpi
def test_shards_of_a_weight_are_slabs_of_the_serial_one(tp: Any) -> None:
    serial, here = queries_and_keys(place(5)), queries_and_keys(place(5, tp))
    for p, q in zip(serial.initialise(4, np.float64), here.initialise(4, np.float64), strict=True):
        assert (p.name, p.shape) == (q.name, q.shape)
        np.testing.assert_array_equal(q.data, p.data[q.index])
