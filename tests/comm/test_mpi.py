"""Every call of MpiCommunicator against its definition, which is computed from pickled copies of every rank's array.

Each runs with MPI reading the arrays themselves and with staged copies, in one message and in pieces of five elements.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp import partition
from hpcmp.comm.base import Solo

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

    from hpcmp.comm.mpi import MpiCommunicator

pytestmark = pytest.mark.mpi
LARGEST = 5  # elements of a message, in the cases that send pieces


@pytest.fixture(params=["direct", "direct-pieces", "staged", "staged-pieces"])
def comm(request: pytest.FixtureRequest, world: Intracomm) -> Iterator[MpiCommunicator]:
    from hpcmp.comm.mpi import MpiCommunicator

    made = MpiCommunicator(world.Dup(), staged="staged" in request.param)
    if "pieces" in request.param:
        made.largest = LARGEST
    yield made
    made.close()


def draw(shape: tuple[int, ...], rank: int, dtype: Any = np.float64, contiguous: bool = True) -> np.ndarray:
    """Numbers that are sums of few binary digits, so that a sum over ranks is exact in every order."""
    x = np.random.default_rng((rank, *shape)).integers(-64, 64, shape[::-1] if not contiguous else shape)
    return x.astype(dtype) if contiguous else x.astype(dtype).T


def totals(size: int) -> list[int]:
    """Lengths that are a multiple of the ranks, uneven, and less than the ranks."""
    return sorted({2 * size, 13, max(1, size - 1), 0})


def everyone(world: Intracomm, x: np.ndarray) -> list[np.ndarray]:
    return world.allgather(np.ascontiguousarray(x))


def same(y: np.ndarray, expected: np.ndarray) -> None:
    assert y.dtype == expected.dtype
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("op", ["sum", "max"])
def test_all_reduce(world: Intracomm, comm: MpiCommunicator, op: str) -> None:
    for shape in ((), (3,), (4, 3), (2, 0)):
        for dtype, contiguous in ((np.float64, True), (np.float32, False), (np.int64, True)):
            x = draw(shape, comm.rank, dtype, contiguous)
            kept = x.copy()
            gathered = np.stack(everyone(world, x).copy()).reshape(comm.size, *shape)
            expected = gathered.sum(0, dtype=dtype) if op == "sum" else gathered.max(0)
            same(comm.all_reduce(x, op).wait(), expected)
            same(x, kept)
            out = np.empty_like(x)
            assert comm.all_reduce(x, op, out).wait() is out
            same(out, expected)
            assert comm.all_reduce(x, op, x).wait() is x
            same(x, expected)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_all_gather(world: Intracomm, comm: MpiCommunicator, axis: int) -> None:
    for total in totals(comm.size):
        for dtype, contiguous in ((np.float64, True), (np.float32, False)):
            shape = [2, 3, 2]
            shape[axis] = partition.sizes(total, comm.size)[comm.rank]
            x = draw(tuple(shape), comm.rank, dtype, contiguous)
            expected = np.concatenate(everyone(world, x), axis)
            assert expected.shape[axis] == total
            same(comm.all_gather(x, axis, total).wait(), expected)
    shape[axis] = 3
    x = draw(tuple(shape), comm.rank)
    same(comm.all_gather(x, axis).wait(), np.concatenate(everyone(world, x), axis))


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_reduce_scatter(world: Intracomm, comm: MpiCommunicator, axis: int) -> None:
    for total in totals(comm.size):
        for dtype, contiguous in ((np.float64, True), (np.float32, False)):
            shape = [2, 3, 2]
            shape[axis] = total
            x = draw(tuple(shape), comm.rank, dtype, contiguous)
            whole = np.sum(everyone(world, x), 0, dtype=dtype)
            same(comm.reduce_scatter(x, axis).wait(), np.array_split(whole, comm.size, axis)[comm.rank])


@pytest.mark.parametrize(("split", "concat"), [(0, 1), (1, 0), (2, 0), (-1, 1)])
def test_all_to_all(world: Intracomm, comm: MpiCommunicator, split: int, concat: int) -> None:
    for length in totals(comm.size):
        for total in totals(comm.size):
            shape = [2, 2, 2]
            shape[split], shape[concat] = length, partition.sizes(total, comm.size)[comm.rank]
            for dtype, contiguous in ((np.float64, True), (np.float32, False)):
                x = draw(tuple(shape), comm.rank, dtype, contiguous)
                parts = [np.array_split(each, comm.size, split)[comm.rank] for each in everyone(world, x)]
                same(comm.all_to_all(x, split, concat, total).wait(), np.concatenate(parts, concat))


def test_broadcast(world: Intracomm, comm: MpiCommunicator) -> None:
    for root in {0, comm.size - 1}:
        for shape in ((), (3,), (4, 3), (0, 2)):
            for contiguous in (True, False):
                x = draw(shape, comm.rank, np.float32, contiguous)
                kept = x.copy()
                same(comm.broadcast(x, root).wait(), everyone(world, x)[root].reshape(shape))
                same(x, kept)


def test_send_and_recv_around_a_ring(world: Intracomm, comm: MpiCommunicator) -> None:
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    arrays = [draw(shape, comm.rank, np.float32, c) for shape in ((), (4, 3), (3, 0)) for c in (True, False)]
    pending = []
    for tag, x in enumerate(arrays):
        pending += [comm.recv(x.shape, x.dtype, before, tag, like=x), comm.send(x, after, tag)]
    for tag, x in enumerate(arrays):
        same(pending[2 * tag].wait(), everyone(world, x)[before].reshape(x.shape))
        pending[2 * tag + 1].wait()


def test_messages_are_matched_by_tag_and_not_by_order(comm: MpiCommunicator) -> None:
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    sent = [comm.send(np.full(7, float(tag)), after, tag) for tag in (1, 2)]
    like = np.empty(0)
    received = {tag: comm.recv((7,), np.float64, before, tag, like=like) for tag in (2, 1)}
    for tag, pending in received.items():
        same(pending.wait(), np.full(7, float(tag)))
    for pending in sent:
        pending.wait()


@pytest.mark.mpi(min_size=2)
def test_test_does_not_block_and_makes_progress(world: Intracomm, comm: MpiCommunicator) -> None:
    if comm.rank == 0:
        pending = comm.recv((8,), np.float64, 1, like=np.empty(0))
        assert not pending.test()
        world.Barrier()
        deadline = time.monotonic() + 10
        while not pending.test():
            assert time.monotonic() < deadline
        same(pending.wait(), np.arange(8.0))
        assert pending.test()
    else:
        world.Barrier()
        if comm.rank == 1:
            comm.send(np.arange(8.0), 0).wait()


def test_many_at_once_and_waited_for_in_any_order(world: Intracomm, comm: MpiCommunicator) -> None:
    x = draw((13, 2), comm.rank)
    pending = [comm.all_reduce(x), comm.all_gather(x, 1), comm.reduce_scatter(x), comm.broadcast(x), comm.all_reduce(x)]
    xs = everyone(world, x)
    total = np.sum(xs, 0)
    expected = [total, np.concatenate(xs, 1), np.array_split(total, comm.size)[comm.rank], xs[0], total]
    for i in (3, 0, 4, 2, 1):
        same(pending[i].wait(), expected[i])
        same(pending[i].wait(), expected[i])  # once more is the same array


def test_a_pending_keeps_its_buffers_alive(comm: MpiCommunicator) -> None:
    n = 1 << 16
    comm.largest = type(comm).largest
    pending = [comm.all_reduce(np.full(n, float(comm.rank + i))) for i in range(4)]
    trash = [np.full(n, np.nan) for _ in range(8)]  # takes the memory of anything that was freed
    for i, each in enumerate(pending):
        assert (each.wait() == sum(range(comm.size)) + i * comm.size).all()
    del trash


@pytest.mark.parametrize("n", [1, 4])
def test_a_shard_of_the_wrong_length_is_refused(comm: MpiCommunicator, n: int) -> None:
    wrong = n if comm.size > 1 or n != 3 else 2
    with pytest.raises(ValueError, match=r"all_gather: this rank's shard has \d rows"):
        comm.all_gather(np.zeros((wrong, 2)), 0, 2 * comm.size).wait()


def test_a_group_of_one_does_what_one_rank_of_mpi_does(world: Intracomm) -> None:
    from mpi4py import MPI

    from hpcmp.comm.mpi import MpiCommunicator

    solo, one = Solo(), MpiCommunicator(MPI.COMM_SELF.Dup())
    x = draw((3, 4), world.rank)
    for call in (
        lambda c: c.all_reduce(x),
        lambda c: c.all_reduce(x, "max"),
        lambda c: c.all_reduce(x, out=np.empty_like(x)),
        lambda c: c.all_gather(x, 1, 4),
        lambda c: c.reduce_scatter(x, 1),
        lambda c: c.all_to_all(x, 0, 1, 4),
        lambda c: c.broadcast(x),
    ):
        same(call(solo).wait(), call(one).wait())
    one.close()
    assert (solo.rank, solo.size) == (0, 1)
    with pytest.raises(ValueError, match="nobody"):
        solo.send(x, 0)
    with pytest.raises(ValueError, match="nobody"):
        solo.recv((3,), np.float64, 0, like=x)
