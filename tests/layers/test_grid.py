"""Layers on grids of tp x tp_y ranks: the serial numbers on every one, and the communication that the page tells of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp import wgrad
from hpcmp.collectives import AllReduce, Copy
from hpcmp.comm.mesh import Mesh
from hpcmp.layers.dropout import Dropout
from hpcmp.layers.embedding import LearnedPositions, VocabularyParallelEmbedding
from hpcmp.layers.linear import ColumnParallelLinear, Output, ParallelHead, RowParallelLinear
from hpcmp.layers.norm import LayerNorm, RMSNorm
from hpcmp.layers.parallel import ModelParallel
from hpcmp.models.architecture import Architecture
from hpcmp.models.transformer import block
from hpcmp.module import Module, Parameter, Residual, Sequential, normal
from hpcmp.testing import assert_adjoint, assert_owned_once, equals_serial, gradcheck, share, whole

from .common import BATCH, Case, draw, place

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

STD = normal(0.3)
#: Of sizes that every number of ranks divides, as the formulas of the page have it.
A = Architecture(
    style="gpt", layers=1, hidden=24, heads=24, kv_heads=24, head_size=1, ffn=96, vocabulary=8, sequence=24
)


@pytest.fixture(scope="module")
def meshes() -> Iterator[list[Mesh]]:
    """Every grid of all ranks, with tp_y alone and tp alone among them."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    made = [Mesh(comm, tp=comm.size // y, tp_y=y) for y in range(1, comm.size + 1) if comm.size % y == 0]
    yield made
    for mesh in made:
        mesh.close()


def grid(mesh: Mesh, length: int, sequence: bool = False) -> ModelParallel:
    return ModelParallel(mesh["tp"], place(length).cursor, sequence=sequence, tp_y=mesh["tp_y"])


def table(p: ModelParallel, hidden: int) -> Parameter:
    return p.sharded(11, hidden, axis=0, hidden=1, initial=STD, name="table")


def tokens(length: int) -> Any:
    return np.random.default_rng(0).integers(0, 11, (length, BATCH))


def feed_forward(p: ModelParallel, hidden: int) -> Module:
    return Residual(
        LayerNorm(p, hidden),
        ColumnParallelLinear(p, hidden, {"weight": Output((7,))}, bias=True, initial=STD),
        RowParallelLinear(p, (7,), hidden, bias=True, initial=STD),
        Dropout(p, hidden, 0.4, "d"),
    )


def model(p: ModelParallel, hidden: int) -> Module:
    """Tied weights at both ends."""
    shared = table(p, hidden)
    return Sequential(
        VocabularyParallelEmbedding(p, shared),
        LearnedPositions(p, 16, hidden, STD),
        feed_forward(p, hidden),
        RMSNorm(p, hidden),
        ParallelHead(p, shared),
    )


def column(h: int, *shape: int, axis: int = 0) -> Case:
    def build(p: ModelParallel) -> Module:
        return ColumnParallelLinear(p, h, {"weight": Output(shape, axis)}, bias=True, initial=STD)

    return Case(build, (h,), "AV", cut_y=share(2 + axis))


def row(h: int, *shape: int, axis: int = 0) -> Case:
    def build(p: ModelParallel) -> Module:
        return RowParallelLinear(p, shape, h, axis=axis, bias=True, initial=STD)

    return Case(build, shape, "VA", cut_x=share(2 + axis))


CASES: dict[str, Callable[[int], Case]] = {
    "column": lambda h: column(h, 7),
    "column of fewer than the ranks": lambda h: column(h, 3),
    "gate and up": lambda h: column(h, 2, 7, axis=1),
    "row": lambda h: row(h, 7),
    "row of fewer than the ranks": lambda h: row(h, 3),
    "row of heads": lambda h: row(h, 5, 4),
    "layer norm": lambda h: Case(lambda p: LayerNorm(p, h), (h,)),
    "rms norm": lambda h: Case(lambda p: RMSNorm(p, h), (h,)),
    "dropout": lambda h: Case(lambda p: Dropout(p, h, 0.4, "d"), (h,)),
    "positions": lambda h: Case(lambda p: LearnedPositions(p, 16, h, STD), (h,)),
    "embedding": lambda h: Case(
        lambda p: VocabularyParallelEmbedding(p, table(p, h)), layout="IA", cut_x=whole, x=tokens
    ),
    "head": lambda h: Case(lambda p: ParallelHead(p, table(p, h)), (h,), "AV", cut_y=share(2)),
    "feed-forward": lambda h: Case(lambda p: feed_forward(p, h), (h,)),
    "block": lambda h: Case(
        lambda p: block(replace(A, hidden=h, heads=6, kv_heads=3, head_size=2, ffn=7), p, "blocks/0"), (h,)
    ),
    "model": lambda h: Case(lambda p: model(p, h), layout="IV", cut_x=whole, cut_y=share(2), x=tokens),
}


@pytest.mark.mpi
@pytest.mark.parametrize("name", CASES)
def test_every_grid_equals_serial(meshes: list[Mesh], name: str) -> None:
    """Of hidden sizes that leave some ranks more than others, and some nothing; sequence shards, uneven and too few."""
    for hidden, length, sequence in ((6, 5, False), (5, 13, True), (3, 5, False), (5, 2, True)):
        case = CASES[name](hidden)
        for mesh in meshes:
            p, x = grid(mesh, length, sequence), case.input(length)
            equals_serial(case.build, p, x, mesh=mesh, cut_x=case.cut_x, cut_y=case.cut_y)


@pytest.mark.mpi
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("block", "model")])
def test_gradients_on_grids(meshes: list[Mesh], name: str) -> None:
    """Where both ends lie alike over all ranks: on tp_y alone, and with sequence shards for what keeps them."""
    case = CASES[name](5)
    for mesh in meshes:
        p = grid(mesh, 5, sequence=mesh["tp"].size > 1)
        if mesh["tp"].size > 1 and case.layout != "AA":
            continue
        layout = case.layout.replace("V", "I").replace("A", "V")
        x = case.cut_x(case.input(5), p)
        gradcheck(case.build(p), x, layout=layout, mesh=mesh, elementwise=0, seed=1)


@pytest.mark.mpi
def test_contract_and_expand_are_adjoint(meshes: list[Mesh]) -> None:
    for mesh in meshes:
        p = grid(mesh, 5)
        assert (type(p.contract), type(p.expand)) == (AllReduce, Copy)
        assert p.contract.comm is p.expand.comm is mesh["tp_y"]
        assert_adjoint(p.contract, (5, 2, 3))
        assert_adjoint(p.expand, (5, 2, 3))


@pytest.mark.mpi
def test_every_parameter_is_owned_once(meshes: list[Mesh]) -> None:
    """With axes shared over tp, over tp_y, over both and over none, and of fewer rows than ranks."""
    for mesh in meshes:
        for sequence in (False, True):
            p = grid(mesh, 5, sequence)
            found = [
                p.replicated(5, 3),
                p.replicated(5, 3, hidden=0),
                p.replicated(5, 3, hidden=1),
                p.sharded(5, 3, axis=0),
                p.sharded(5, 3, axis=0, hidden=1),
                p.sharded(5, 3, axis=1, hidden=0),
            ]
            for i, parameter in enumerate(found):
                parameter.name, parameter.data = str(i), np.zeros(parameter.local_shape)
                assert parameter.shared == (("tp",) if sequence and i < 3 else ())
            assert_owned_once(found, mesh[mesh.axes])
            x, y = mesh["tp"], mesh["tp_y"]
            assert found[5].index == (y.part(5), x.part(3))


@pytest.mark.mpi
def test_the_y_axis_alone_is_the_mirrored_form(world: Intracomm) -> None:
    """Rows of the first weight of a pair and columns of the second; one sum in each direction, and none without y."""
    with Mesh(world, tp_y=world.size) as mesh:
        p, y = grid(mesh, 5), mesh["tp_y"]
        first, second = column(5, 7).build(p), row(5, 7).build(p)
        for module in first, second:
            module.initialise(0, np.float64)
        assert isinstance(first, ColumnParallelLinear) and isinstance(second, RowParallelLinear)
        mine = y.part(5).stop - y.part(5).start
        assert first.weights["weight"].local_shape == (mine, 7) and first.biases["bias"].local_shape == (7,)
        assert second.weight.local_shape == (7, mine)
        calls = []
        for module, x in (first, draw(5, BATCH, mine)), (second, draw(5, BATCH, 7)):
            for step in (
                lambda module=module, x=x: module.forward(x),
                lambda module=module, x=x: module.backward(module.forward(x)[0], x, wgrad.now),
            ):
                before = y.traffic.get("all_reduce", (0, 0))[0]
                step()
                calls.append(y.traffic.get("all_reduce", (0, 0))[0] - before)
        # Each backward above runs a forward first.
        assert calls == ([1, 1, 0, 1] if world.size > 1 else [0, 0, 0, 0])


@pytest.mark.mpi
@pytest.mark.parametrize("sequence", [False, True])
def test_a_block_sends_what_the_page_says(meshes: list[Mesh], sequence: bool) -> None:
    """docs/tensor-parallelism.md, "What it sends": the formula against the communicators' counters, to the byte."""
    for mesh in meshes:
        p = grid(mesh, A.sequence, sequence)
        x, y, tokens = p.tp.size, p.tp_y.size, A.sequence * BATCH
        module = block(A, p, "blocks/0")
        module.initialise(0, np.float64)
        activation = p.positions().size, BATCH, A.hidden // y
        mesh.forget_traffic()
        result, saved = module.forward(np.ones(activation))
        module.backward(result, saved, wgrad.now)
        over_x = (10 if sequence else 8) * (x - 1) * tokens * A.hidden / (x * y)
        over_y = 24 * (y - 1) * tokens * A.hidden / (x * y)
        norms = 16 * (y - 1) / y * tokens / (x if sequence else 1)
        assert (p.tp.traffic.sent, p.tp_y.traffic.sent) == (8 * over_x, 8 * (over_y + norms))
