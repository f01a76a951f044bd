"""Every call of MpiCommunicator against its definition: each rank can draw every rank's array, and computes the result.

Each runs with MPI reading the arrays themselves and with staged copies, in one message and in pieces of five elements.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp import partition
from hpcmp.comm.base import Communicator, Pending, Solo

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

    from hpcmp.comm.mpi import MpiCommunicator

pytestmark = pytest.mark.mpi
LARGEST = 5  # elements of a message, in the cases that send pieces


@pytest.fixture(scope="module", params=["direct", "direct-pieces", "staged", "staged-pieces"])
def comm(request: pytest.FixtureRequest) -> Iterator[MpiCommunicator]:
    from mpi4py import MPI

    from hpcmp.comm.mpi import MpiCommunicator

    made = MpiCommunicator(MPI.COMM_WORLD.Dup(), staged="staged" in request.param)
    if "pieces" in request.param:
        made.largest = LARGEST
    yield made
    made.close()


def draw(shape: Sequence[int], rank: int, dtype: Any = np.float64, contiguous: bool = True) -> np.ndarray:
    """The array of a rank: whole numbers, so that a sum over ranks is exact in every order."""
    x = np.random.default_rng((rank, *shape)).integers(-64, 64, shape if contiguous else shape[::-1])
    return np.asarray(x, dtype) if contiguous else np.asarray(x, dtype).T


def shards(shape: Sequence[int], axis: int, total: int, size: int, *args: Any) -> list[np.ndarray]:
    """Every rank's array, of ``shape`` but for its share of an axis of ``total``."""
    shapes = [list(shape) for _ in range(size)]
    for rank, n in enumerate(partition.sizes(total, size)):
        shapes[rank][axis] = n
    return [draw(shapes[rank], rank, *args) for rank in range(size)]


def totals(size: int) -> list[int]:
    """Lengths that are a multiple of the ranks, uneven, and less than the ranks."""
    return sorted({2 * size, 13, max(1, size - 1), 0})


def same(y: np.ndarray, expected: np.ndarray) -> None:
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(y, expected)


KINDS: list[tuple[Any, bool]] = [(np.float64, True), (np.float32, False)]  # dtype, whether contiguous


@pytest.mark.parametrize("op", ["sum", "max"])
def test_all_reduce(comm: MpiCommunicator, op: Any) -> None:
    for shape in ((), (4, 3), (2, 0)):
        for kind in (*KINDS, (np.int64, True)):
            arrays = [draw(shape, rank, *kind) for rank in range(comm.size)]
            x = arrays[comm.rank].copy(order="K")
            expected = np.asarray(np.sum(arrays, 0, dtype=kind[0]) if op == "sum" else np.max(arrays, 0))
            same(comm.all_reduce(x, op).wait(), expected)
            same(x, arrays[comm.rank])
            out = np.empty_like(x)
            assert comm.all_reduce(x, op, out).wait() is out
            same(out, expected)
            assert comm.all_reduce(x, op, x).wait() is x
            same(x, expected)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_all_gather(comm: MpiCommunicator, axis: int) -> None:
    for total in totals(comm.size):
        for kind in KINDS:
            arrays = shards((2, 3, 2), axis, total, comm.size, *kind)
            same(comm.all_gather(arrays[comm.rank], axis, total).wait(), np.concatenate(arrays, axis))
    arrays = shards((2, 3, 2), axis, 3 * comm.size, comm.size)
    same(comm.all_gather(arrays[comm.rank], axis).wait(), np.concatenate(arrays, axis))


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_reduce_scatter(comm: MpiCommunicator, axis: int) -> None:
    for total in totals(comm.size):
        for kind in KINDS:
            shape = [2, 3, 2]
            shape[axis] = total
            arrays = [draw(shape, rank, *kind) for rank in range(comm.size)]
            expected = np.array_split(np.sum(arrays, 0, dtype=kind[0]), comm.size, axis)[comm.rank]
            same(comm.reduce_scatter(arrays[comm.rank], axis).wait(), expected)


@pytest.mark.parametrize(("split", "concat"), [(0, 1), (2, 0), (-1, 1)])
def test_all_to_all(comm: MpiCommunicator, split: int, concat: int) -> None:
    lengths = totals(comm.size)
    for i, length in enumerate(lengths):
        for total in (length, lengths[i - 1]):
            shape = [2, 2, 2]
            shape[split] = length
            arrays = shards(shape, concat, total, comm.size, *KINDS[i % 2])
            parts = [np.array_split(x, comm.size, split)[comm.rank] for x in arrays]
            same(comm.all_to_all(arrays[comm.rank], split, concat, total).wait(), np.concatenate(parts, concat))


def numbers_of_rows(size: int) -> list[list[int]]:
    """Rows of every rank: uneven with none in between, for one rank alone, for nobody."""
    return [[(5 * r) % 4 for r in range(size)], [0] * (size - 1) + [4], [0] * size]


def test_all_gather_v(comm: MpiCommunicator) -> None:
    for rows in numbers_of_rows(comm.size):
        for kind in KINDS:
            arrays = [draw((n, 2, 3), rank, *kind) for rank, n in enumerate(rows)]
            same(comm.all_gather_v(arrays[comm.rank], rows).wait(), np.concatenate(arrays))


def test_reduce_scatter_v(comm: MpiCommunicator) -> None:
    for rows in numbers_of_rows(comm.size):
        for kind in KINDS:
            arrays = [draw((sum(rows), 2), rank, *kind) for rank in range(comm.size)]
            start = sum(rows[: comm.rank])
            expected = np.sum(arrays, 0, dtype=kind[0])[start : start + rows[comm.rank]]
            same(comm.reduce_scatter_v(arrays[comm.rank], rows).wait(), expected)


def tables(size: int) -> list[np.ndarray]:
    """Rows that rank i sends to rank j: any, none from most, none at all."""
    i, j = np.indices((size, size))
    return [(3 * i + 5 * j) % 4, np.where(i == size - 1, j, 0), 0 * i]


def test_all_to_all_v(comm: MpiCommunicator) -> None:
    for table in tables(comm.size):
        for kind in KINDS:
            arrays = [draw((int(row.sum()), 3), rank, *kind) for rank, row in enumerate(table)]
            sent, received = table[comm.rank].tolist(), table[:, comm.rank].tolist()
            starts = [int(row[: comm.rank].sum()) for row in table]
            parts = [x[a : a + n] for x, a, n in zip(arrays, starts, received, strict=True)]
            same(comm.all_to_all_v(arrays[comm.rank], sent, received).wait(), np.concatenate(parts))


def test_collectives_of_any_rows_and_their_adjoints(comm: MpiCommunicator) -> None:
    """<A x, y> = <x, A^T y>, exactly on whole numbers: all_gather_v and reduce_scatter_v, all_to_all_v and its back."""

    def agree(ax: np.ndarray, y: np.ndarray, x: np.ndarray, aty: np.ndarray) -> None:
        both = comm.all_reduce(np.array([np.vdot(ax, y), np.vdot(x, aty)])).wait()
        assert both[0] == both[1]

    for rows in numbers_of_rows(comm.size):
        x, y = draw((rows[comm.rank], 3), comm.rank), draw((sum(rows), 3), comm.rank + 100)
        agree(comm.all_gather_v(x, rows).wait(), y, x, comm.reduce_scatter_v(y, rows).wait())
    for table in tables(comm.size):
        sent, received = table[comm.rank].tolist(), table[:, comm.rank].tolist()
        x, y = draw((sum(sent), 3), comm.rank), draw((sum(received), 3), comm.rank + 100)
        agree(comm.all_to_all_v(x, sent, received).wait(), y, x, comm.all_to_all_v(y, received, sent).wait())


def test_broadcast(comm: MpiCommunicator) -> None:
    for root in sorted({0, comm.size - 1}):
        for shape in ((), (3,), (4, 3), (0, 2)):
            for kind in KINDS:
                x = draw(shape, comm.rank, *kind)
                same(comm.broadcast(x, root).wait(), draw(shape, root, *kind))
                same(x, draw(shape, comm.rank, *kind))


def test_send_and_recv_around_a_ring(comm: MpiCommunicator) -> None:
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    cases = [(shape, *kind) for shape in ((), (4, 3), (3, 0)) for kind in KINDS]
    pending = []
    for tag, case in enumerate(cases):
        x = draw(case[0], comm.rank, *case[1:])
        pending += [comm.recv(x.shape, x.dtype, before, tag, like=x), comm.send(x, after, tag)]
    for tag, case in enumerate(cases):
        same(pending[2 * tag].wait(), draw(case[0], before, *case[1:]))
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


def test_many_at_once_and_waited_for_in_any_order(comm: MpiCommunicator) -> None:
    xs = [draw((13, 2), rank) for rank in range(comm.size)]
    x = xs[comm.rank]
    pending = [comm.all_reduce(x), comm.all_gather(x, 1), comm.reduce_scatter(x), comm.broadcast(x), comm.all_reduce(x)]
    total = np.sum(xs, 0)
    expected = [total, np.concatenate(xs, 1), np.array_split(total, comm.size)[comm.rank], xs[0], total]
    for i in (3, 0, 4, 2, 1):
        same(pending[i].wait(), expected[i])
        same(pending[i].wait(), expected[i])  # once more is the same array


def test_a_pending_keeps_its_buffers_alive(comm: MpiCommunicator) -> None:
    n = 100 if comm.largest == LARGEST else 1 << 16
    pending = [comm.all_reduce(np.full(n, float(comm.rank + i))) for i in range(4)]
    trash = [np.full(n, np.nan) for _ in range(8)]  # takes the memory of anything that was freed
    for i, each in enumerate(pending):
        assert (each.wait() == sum(range(comm.size)) + i * comm.size).all()
    del trash


def test_an_abandoned_communication_writes_into_no_other_array(world: Intracomm, comm: MpiCommunicator) -> None:
    """As an exception leaves one on a rank that is ahead of the others."""
    pending = [comm.all_reduce(np.ones(100)) for _ in range(4)] if comm.rank == 0 else []
    pending.clear()
    others = [np.full(100, 7.0) for _ in range(16)]  # they take the memory of anything that was freed
    world.Barrier()
    if comm.rank > 0:
        pending = [comm.all_reduce(np.ones(100)) for _ in range(4)]
    for each in [*pending, comm.all_reduce(np.ones(1))]:
        each.wait()
    assert (np.array(others) == 7).all()


@pytest.mark.parametrize("n", [1, 4])
def test_a_shard_of_the_wrong_length_is_refused(comm: MpiCommunicator, n: int) -> None:
    with pytest.raises(ValueError, match=rf"all_gather: this rank's shard has {n} rows, not 2"):
        comm.all_gather(np.zeros((n, 2)), 0, 2 * comm.size)


def test_a_group_of_one_does_what_one_rank_of_mpi_does(world: Intracomm) -> None:
    from mpi4py import MPI

    from hpcmp.comm.mpi import MpiCommunicator

    solo, one = Solo(), MpiCommunicator(MPI.COMM_SELF.Dup())
    x = draw((3, 4), world.rank)
    calls: tuple[Callable[[Communicator], Pending], ...] = (
        lambda c: c.all_reduce(x),
        lambda c: c.all_reduce(x, "max"),
        lambda c: c.all_reduce(x, out=np.empty_like(x)),
        lambda c: c.all_gather(x, 1, 4),
        lambda c: c.reduce_scatter(x, 1),
        lambda c: c.all_to_all(x, 0, 1, 4),
        lambda c: c.broadcast(x),
        lambda c: c.all_gather_v(x, [3]),
        lambda c: c.reduce_scatter_v(x, [3]),
        lambda c: c.all_to_all_v(x, [3], [3]),
    )
    for call in calls:
        same(call(solo).wait(), call(one).wait())
    one.close()
    assert (solo.rank, solo.size) == (0, 1)
    with pytest.raises(ValueError, match="nobody"):
        solo.send(x, 0)
    with pytest.raises(ValueError, match="nobody"):
        solo.recv((3,), np.float64, 0, like=x)
