"""Every collective against its adjoint and against its definition, with even, uneven and empty shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp import partition, wgrad
from hpcmp.collectives import AllGather, AllReduce, AllToAll, Collective, Copy, Gather, ReduceScatter, Split
from hpcmp.comm.base import Communicator, Solo
from hpcmp.module import Sequential
from hpcmp.testing import assert_adjoint

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi
ONE_AXIS = [Copy, AllReduce, AllGather, ReduceScatter, Split, Gather]


@pytest.fixture(scope="module")
def tp() -> Iterator[Communicator]:
    from mpi4py import MPI

    from hpcmp.comm.mesh import Mesh

    with Mesh(MPI.COMM_WORLD, tp=MPI.COMM_WORLD.size) as mesh:
        yield mesh["tp"]


def totals(tp: Communicator) -> list[int]:
    """Lengths of an axis: a multiple of the ranks, uneven, and fewer than the ranks."""
    return sorted({2 * tp.size, 13, max(1, tp.size - 1)})


def local(op: type[Collective], shape: tuple[int, ...], axis: int, tp: Communicator) -> tuple[int, ...]:
    """What a rank passes to ``op`` of an array of ``shape``."""
    if op not in (AllGather, Gather):
        return shape
    return tuple(partition.sizes(n, tp.size)[tp.rank] if i == axis else n for i, n in enumerate(shape))


def everyone(tp: Communicator, x: np.ndarray) -> list[np.ndarray]:
    """Every rank's array, by another way than the one under test."""
    from mpi4py import MPI

    assert tp.size == MPI.COMM_WORLD.size
    return MPI.COMM_WORLD.allgather(x)


@pytest.mark.parametrize(("axis", "dtype"), [(0, np.float64), (1, np.float32), (2, np.float64)])
@pytest.mark.parametrize("op", ONE_AXIS)
def test_adjoint(tp: Communicator, op: type[Collective], axis: int, dtype: Any) -> None:
    for n in totals(tp):
        shape = tuple(n if i == axis else 3 for i in range(3))
        assert_adjoint(op(tp, axis, n), local(op, shape, axis, tp), dtype=dtype)


@pytest.mark.parametrize(
    ("axes", "dtype"), [((0, 1), np.float64), ((1, 0), np.float32), ((2, 0), np.float64), ((1, 2), np.float32)]
)
def test_all_to_all_adjoint(tp: Communicator, axes: tuple[int, int], dtype: Any) -> None:
    for whole in ((13, 2 * tp.size, 5), (2, 13, 13), (tp.size, tp.size, tp.size)):
        shape = list(whole)
        shape[axes[1]] = partition.sizes(whole[axes[1]], tp.size)[tp.rank]
        op = AllToAll(tp, axes, (whole[axes[0]], whole[axes[1]]))
        assert_adjoint(op, tuple(shape), dtype=dtype)


@pytest.mark.parametrize("op", ONE_AXIS)
def test_without_a_total_shards_are_equal(tp: Communicator, op: type[Collective]) -> None:
    assert_adjoint(op(tp), local(op, (3 * tp.size, 2), 0, tp))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_definitions(tp: Communicator, axis: int) -> None:
    for n in totals(tp):
        shape = tuple(n if i == axis else 2 for i in range(3))
        rng = np.random.default_rng((tp.rank, n))
        x = rng.normal(size=shape[::-1]).T  # not contiguous
        shard = x[tuple(slice(k) for k in local(AllGather, shape, axis, tp))]
        xs, shards = everyone(tp, x), everyone(tp, shard)
        mine = np.array_split(np.arange(n), tp.size)[tp.rank]
        expected = {
            Copy: x,
            AllReduce: sum(xs),
            AllGather: np.concatenate(shards, axis),
            Gather: np.concatenate(shards, axis),
            ReduceScatter: np.take(sum(xs), mine, axis),
            Split: np.take(x, mine, axis),
        }
        for op, y in expected.items():
            found = op(tp, axis, n)(shard if op in (AllGather, Gather) else x)
            np.testing.assert_allclose(found, y, rtol=1e-14, atol=1e-14, strict=True, err_msg=op.__name__)


@pytest.mark.parametrize(("split", "concat"), [(0, 1), (1, 0), (2, 1)])
def test_all_to_all_definition(tp: Communicator, split: int, concat: int) -> None:
    for whole in ((13, 2 * tp.size, 5), (2, 13, 13)):
        shape = list(whole)
        shape[concat] = partition.sizes(whole[concat], tp.size)[tp.rank]
        x = np.random.default_rng(tp.rank).normal(size=shape[::-1]).T
        parts = [np.array_split(each, tp.size, split)[tp.rank] for each in everyone(tp, x)]
        found = AllToAll(tp, (split, concat), (whole[split], whole[concat]))(x)
        np.testing.assert_array_equal(found, np.concatenate(parts, concat), strict=True)


@pytest.mark.parametrize("n", [12, 13])
def test_identities_between_collectives(tp: Communicator, n: int) -> None:
    x = np.random.default_rng(tp.rank).normal(size=(n, 2, 3))
    same = np.random.default_rng(0).normal(size=(n, 2, 3))
    np.testing.assert_allclose(ReduceScatter(tp, 0, n)(x), Split(tp)(AllReduce(tp)(x)), rtol=1e-14, atol=1e-14)
    np.testing.assert_array_equal(Gather(tp, 0, n)(Split(tp, 0, n)(same)), same)
    shard = Split(tp)(x)
    there, back = AllToAll(tp, (1, 0), (2, n)), AllToAll(tp, (0, 1), (n, 2))
    np.testing.assert_array_equal(back(there(shard)), shard)


def test_the_total_may_change_between_calls(tp: Communicator) -> None:
    """A function is asked at each call, by the operator and by its adjoint."""
    length = 13
    op = AllGather(tp, 0, lambda: length)
    adjoint, twice = op.T, op.T.T
    for length in (13, 5, 2 * tp.size):
        shard = np.arange(length)[tp.part(length)].astype(float)
        np.testing.assert_array_equal(op(shard), np.arange(length))
        np.testing.assert_array_equal(twice(shard), np.arange(length))
        np.testing.assert_array_equal(adjoint(np.arange(float(length))), tp.size * shard)


def test_a_collective_is_a_module(tp: Communicator) -> None:
    """Backward applies the adjoint; a chain of them is the chain rule's."""
    x = np.random.default_rng(tp.rank).normal(size=(13, 2))
    chain = Sequential(AllReduce(tp), Split(tp, 0, 13), Gather(tp, 0, 13))
    y, saved = chain.forward(x)
    np.testing.assert_array_equal(y, AllReduce(tp)(x))
    dy = np.random.default_rng(7).normal(size=(13, 2))
    np.testing.assert_array_equal(chain.backward(dy, saved, wgrad.now), dy)
    assert chain.parameters() == []


def test_start_and_wait_overlap_with_work(tp: Communicator) -> None:
    x = np.random.default_rng(tp.rank).normal(size=(13, 2))
    pending = [AllReduce(tp).start(x), ReduceScatter(tp).start(x)]
    work = x @ x.T
    total, part = (each.wait() for each in pending)
    np.testing.assert_allclose(part, total[tp.part(13)], rtol=1e-14, atol=1e-14)
    assert work.shape == (13, 13)


@pytest.mark.parametrize("op", ONE_AXIS)
def test_on_one_rank_each_is_the_identity(world: Intracomm, op: type[Collective]) -> None:
    x = np.random.default_rng(world.rank).normal(size=(4, 3))
    np.testing.assert_array_equal(op(Solo())(x), x)
    assert_adjoint(op(Solo()), (4, 3))


@pytest.mark.mpi(min_size=2)
def test_the_adjoint_test_sees_errors(tp: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each planted error is found, by every rank at once. (On one rank there is nothing to see.)"""

    def refuses(op: Collective, shape: tuple[int, ...]) -> None:
        with pytest.raises(AssertionError):
            assert_adjoint(op, shape)

    class Twice(AllReduce):  # its adjoint is that of half of it
        def start(self, x: np.ndarray) -> Any:
            return super().start(2 * x)

    class Rolled(ReduceScatter):  # off by one rank
        def start(self, x: np.ndarray) -> Any:
            return super().start(np.roll(x, -1, 0))

    class Local(AllReduce):  # leaves out the sum, so that what should be invariant is not
        def start(self, x: np.ndarray) -> Any:
            return Copy(self.comm).start(x)

    from hpcmp import collectives

    monkeypatch.setitem(collectives.ADJOINT, Twice, Copy)
    monkeypatch.setitem(collectives.ADJOINT, Rolled, AllGather)
    monkeypatch.setitem(collectives.ADJOINT, Local, Copy)
    refuses(Twice(tp), (3,))
    refuses(Rolled(tp, 0, 13), (13, 2))
    refuses(Local(tp), (3,))
    monkeypatch.setitem(collectives.ADJOINT, Copy, Copy)  # no sum in the adjoint
    refuses(Copy(tp), (3,))
    monkeypatch.setitem(collectives.ADJOINT, AllGather, Split)
    refuses(AllGather(tp, 0, 13), local(AllGather, (13, 2), 0, tp))
