"""Mixture of experts over ranks: the serial layer's numbers on every layout of its tokens, experts and columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp import wgrad
from hpcmp.arrays import Array
from hpcmp.comm.mesh import Mesh
from hpcmp.cursor import Cursor, Place
from hpcmp.layers.moe import MixtureOfExperts
from hpcmp.layers.moe.dispatch import Dispatch
from hpcmp.layers.parallel import ModelParallel
from hpcmp.testing import prepare

from .common import draw
from .test_moe import CASES, EXPERTS, HIDDEN, moe

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

LENGTH, BATCH = 7, 5
LOSSES = {"balance_loss": 3.0, "z_loss": 0.5}


def layouts(ranks: int) -> list[dict[str, int]]:
    """Every ep of dp and of cp (with ulysses where it can be), and of both with half of the ranks as tp."""
    found = []
    for tp in (tp for tp in (1, 2) if ranks % tp == 0):
        data = ranks // tp
        for ep in (n for n in range(1, data + 1) if data % n == 0):
            found.append({"dp": data, "tp": tp, "ep": ep})
            found.append({"cp": data, "tp": tp, "ep": ep, "ulysses": 2 - data % 2})
    return found


def run(layer: MixtureOfExperts, x: Array, dy: Array) -> tuple[Array, Array]:
    y, saved = layer.forward(x)
    return y, layer.backward(dy, saved, wgrad.now)


def assert_serial(mesh: Mesh, *, sequence: bool = False, x: Array | None = None, **settings: Any) -> None:
    """Output, input gradient, every parameter's gradient and the losses are the serial layer's."""
    x = draw(LENGTH, BATCH, HIDDEN) if x is None else x
    dy, scale = draw(LENGTH, BATCH, HIDDEN + 1)[..., 1:], 1 / (LENGTH * BATCH)
    serial = ModelParallel(cursor=Cursor())
    serial.cursor.place = Place(1, np.arange(BATCH), LENGTH, weight=scale)
    expected = moe(serial, **settings, **LOSSES)
    wholes = {p.name: p for p in prepare(expected, 2)}
    y, dx = run(expected, x, dy)

    mine = mesh["dp"].part(BATCH)
    groups = {axis: mesh[axis] for axis in ("ring", "ulysses", "cp", "ep")}
    parallel = ModelParallel(mesh["tp"], Cursor(), sequence=sequence, **groups)
    parallel.cursor.place = Place(1, np.arange(BATCH)[mine], LENGTH, weight=scale)
    layer = moe(parallel, **settings, **LOSSES)
    parameters = prepare(layer, 2)
    here = parallel.positions()
    found = run(layer, x[here][:, mine], dy[here][:, mine])

    for name, a, b in (("y", found[0], y), ("dx", found[1], dx)):
        np.testing.assert_allclose(a, b[here][:, mine], rtol=1e-12, atol=1e-12, err_msg=name)
    assert {p.name: p.shape for p in parameters} == {name: p.shape for name, p in wholes.items()}
    for p in parameters:
        grad = mesh[(*p.replicas, *p.shared)].all_reduce(p.grad).wait()
        np.testing.assert_allclose(grad, wholes[p.name].grad[p.index], rtol=1e-12, atol=1e-12, err_msg=p.name)
    names = list(serial.cursor.losses)
    some = np.array([parallel.cursor.losses.get(name, 0.0) for name in names])
    total = mesh[Mesh.axes].all_reduce(some).wait()
    np.testing.assert_allclose(total, list(serial.cursor.losses.values()), rtol=1e-12)


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["softmax", "sigmoid", "one a token", "capacity", "everything"])
def test_layouts(world: Intracomm, name: str) -> None:
    """5 experts over up to 8 ranks: uneven, and none on some; 5 samples, so that some ranks have no token."""
    for axes in layouts(world.size):
        with Mesh(world, **axes) as mesh:
            for sequence in (False, True) if axes["tp"] > 1 else (False,):
                assert_serial(mesh, sequence=sequence, **CASES[name])


@pytest.mark.mpi
def test_all_tokens_to_one_expert(world: Intracomm) -> None:
    """Every other expert, and the ranks that hold none but those, gets no row."""
    x = np.ones((LENGTH, BATCH, HIDDEN))
    with Mesh(world, dp=world.size, ep=world.size) as mesh:
        assert_serial(mesh, x=x, per_token=1)
        assert_serial(mesh, x=x, per_token=1, capacity=1.0)


@pytest.mark.mpi
def test_dispatch_is_a_permutation_and_its_adjoint(world: Intracomm) -> None:
    """<D x, y> = <x, D^T y> over all ranks, and each expert's rows come by rank and token."""
    with Mesh(world, dp=world.size, ep=world.size) as mesh:
        ep = mesh["ep"]
        rng = np.random.default_rng(ep.rank)
        chosen = np.argsort(rng.random((4 + ep.rank, EXPERTS + 1)), -1)[:, :3]
        dispatch = Dispatch(ep, chosen, EXPERTS)
        x = rng.normal(size=(len(dispatch.order), 2))
        there = dispatch.start(x).wait()
        y = rng.normal(size=there.shape)
        back = dispatch.start_back(y).wait()
        sides = np.array([(there * y).sum(), (back.reshape(-1, 2)[dispatch.order] * x).sum()])
        sides = ep.all_reduce(sides).wait()
        assert sides[0] == pytest.approx(sides[1], rel=1e-12, abs=1e-12)

        names = np.stack([chosen.reshape(-1)[dispatch.order], 100 * ep.rank + dispatch.token], 1).astype(float)
        arrived = dispatch.start(names).wait()
        held = ep.part(EXPERTS)
        expected = np.repeat(np.arange(held.start, held.stop), dispatch.rows)
        np.testing.assert_array_equal(arrived[:, 0], expected)
        assert all(a <= b for a, b in zip(arrived.tolist(), arrived.tolist()[1:], strict=False))
