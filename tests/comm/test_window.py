"""WindowCommunicator: the numbers of MPI through shared memory, in any pieces, with any messages under way at once."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.arrays import dtype_of
from hpcmp.comm import base, window
from hpcmp.comm.mesh import Mesh
from hpcmp.comm.topology import Topology
from tests.comm.cases import assert_a_waiting_rank_holds_up_no_sum, differences
from tests.comm.test_hierarchical import whole_numbers

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

    from hpcmp.comm.window import WindowCommunicator


@pytest.fixture(params=[0, 2**20], ids=["pieces", "one go"])
def comm(world: Intracomm, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Slots of 64 bytes a rank, so that nearly all messages are of many pieces, and slots that hold all."""
    if not request.param:
        monkeypatch.setattr(window, "DIRECT", 16)
    made = window.WindowCommunicator(world.Dup(), request.param, window.EVERY)
    yield made
    made.close()


@pytest.mark.mpi
def test_equals_mpi(world: Intracomm, comm: WindowCommunicator) -> None:
    from hpcmp.comm.mpi import MpiCommunicator

    flat = MpiCommunicator(world.Dup())
    assert not differences(comm, flat, np)
    assert comm.traffic == flat.traffic
    assert not base.DRIVERS
    flat.close()


@pytest.mark.mpi
def test_many_at_once_waited_for_in_another_order_on_each_rank(comm: WindowCommunicator) -> None:
    draw, size = random.Random(comm.rank), comm.size
    sizes = [5, 1000, 1, 0, 4000, 13, 200, 300]
    pending, expected = [], []
    for i, n in enumerate(sizes):
        xs = [whole_numbers(rank, i, n) for rank in range(size)]
        x, total = xs[comm.rank], np.sum(xs, 0)
        pending += [comm.all_reduce(x), comm.all_gather(x), comm.reduce_scatter(x), comm.broadcast(x, i % size)]
        expected += [total, np.concatenate(xs), np.array_split(total, size)[comm.rank], xs[i % size]]
        for each in draw.sample(pending, draw.randrange(len(pending) + 1)):
            each.test()
    for i in draw.sample(range(len(pending)), len(pending)):
        np.testing.assert_array_equal(pending[i].wait(), expected[i])
        assert pending[i].test()
    assert not base.DRIVERS


@pytest.mark.mpi
@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_on_several_communicators_with_messages_between(
    world: Intracomm, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank starts the same things; when it looks, waits or sleeps is its own affair."""
    from hpcmp.comm.mpi import MpiCommunicator

    plan, mine = random.Random(seed), random.Random(100 * seed + world.rank + 1)
    monkeypatch.setattr(window, "DIRECT", plan.choice((16, 2**20)))
    comms: list[Any] = [window.WindowCommunicator(world.Dup(), size, window.EVERY) for size in (2**10, 2**16)]
    comms += [window.WindowCommunicator(world.Split(world.rank % 2), 2**12, window.EVERY), MpiCommunicator(world.Dup())]
    pending: list[tuple[base.Pending, Any]] = []
    for i in range(40):
        comm = plan.choice(comms)
        first, step = (world.rank % 2, 2) if comm is comms[2] else (0, 1)
        n, dtype = int(10 ** plan.uniform(0, 4.3)) - 1, plan.choice((np.int16, np.int32, np.int64, np.float32))
        xs = [_drawn(rank, seed, i, n).astype(dtype) for rank in range(first, world.size, step)]
        x, total, rank = xs[comm.rank], np.sum(xs, 0, dtype=dtype), comm.rank
        kind = plan.randrange(7)
        if kind < 2:
            pending.append((comm.all_reduce(x, out=x if kind else None), total))
        elif kind == 2:
            pending.append((comm.all_reduce(x, "max"), np.max(xs, 0)))
        elif kind == 3:
            pending.append((comm.all_gather(x), np.concatenate(xs)))
        elif kind == 4:
            pending.append((comm.reduce_scatter(x), np.array_split(total, comm.size)[rank]))
        elif kind == 5:
            pending.append((comm.broadcast(x, comm.size - 1), xs[-1]))
        else:  # to the next of a ring, which another rank may be long past or has not come to
            before, after = (rank - 1) % comm.size, (rank + 1) % comm.size
            pending += [(comm.recv(x.shape, dtype, before, i, like=x), xs[before]), (comm.send(x, after, i), x)]
        if mine.random() < 0.1:
            time.sleep(3e-3 * mine.random())
        for each, _ in mine.sample(pending, mine.randrange(len(pending) + 1)):
            each.test()
        while pending and mine.random() < 0.35:
            done, expected = pending.pop(mine.randrange(len(pending)))
            np.testing.assert_array_equal(done.wait(), expected)
    for done, expected in mine.sample(pending, len(pending)):
        np.testing.assert_array_equal(done.wait(), expected)
    for comm in comms:
        comm.close()
    assert not base.DRIVERS


def _drawn(rank: int, seed: int, i: int, n: int) -> Any:
    return np.random.default_rng((rank, seed, i)).integers(-50, 50, n)


@pytest.mark.mpi(min_size=2)
def test_a_message_not_yet_received_does_not_keep_mpi_from_progress(comm: WindowCommunicator, world: Intracomm) -> None:
    """The last rank, which has a message that it does not expect yet, waits for the others in shared memory, and they
    for it in MPI."""
    from hpcmp.comm.mpi import MpiCommunicator

    flat, last, x = MpiCommunicator(world.Dup()), comm.size - 1, np.ones(50_000)
    if comm.rank == 0:
        comm.send(np.ones(3), last, 5).wait()
    world.Barrier()
    total = flat.all_reduce(x)
    if comm.rank != last:
        assert (total.wait() == comm.size).all()
    assert (comm.all_reduce(np.ones(100)).wait() == comm.size).all()
    assert (total.wait() == comm.size).all()
    if comm.rank == last:
        assert (comm.recv((3,), np.float64, 0, 5, like=x).wait() == 1).all()
    flat.close()


@pytest.mark.mpi
def test_meshes_made_and_closed_one_after_another(world: Intracomm) -> None:
    for i in range(20):
        with Mesh(world, dp=world.size, shared_memory="yes", window_mb=0.1) as mesh:
            for group in (mesh["dp"], mesh["dp", "tp"], mesh["copy"]):
                assert (group.all_reduce(np.full(i + 1, 2.0)).wait() == 2 * world.size).all()
    assert not base.DRIVERS


@pytest.mark.mpi
def test_what_nobody_waits_for_is_sent_all_the_same(comm: WindowCommunicator) -> None:
    """A rank gives up a sum that others wait for, as after an exception, and goes on; ``close`` is when it is over."""
    n = 3000
    abandoned = comm.all_reduce(np.arange(n))
    if comm.rank:
        np.testing.assert_array_equal(abandoned.wait(), comm.size * np.arange(n))
    del abandoned
    if comm.rank == comm.size - 1:
        comm.all_reduce(np.ones(n))
    else:
        assert (comm.all_reduce(np.ones(n)).wait() == comm.size).all()


@pytest.mark.mpi
def test_sums_are_in_the_order_of_ranks(comm: WindowCommunicator) -> None:
    """The same bits on every rank, however the message is cut."""
    for dtype in (np.float32, np.float64):
        for n in (1, 7, 1234):
            xs = [np.random.default_rng((rank, n)).standard_normal(n).astype(dtype) for rank in range(comm.size)]
            expected = xs[0].copy()
            for x in xs[1:]:
                expected += x
            x = xs[comm.rank]
            np.testing.assert_array_equal(comm.all_reduce(x).wait(), expected)
            part = comm.reduce_scatter(x).wait()
            np.testing.assert_array_equal(part, np.array_split(expected, comm.size)[comm.rank])
            assert comm.all_reduce(x, out=x).wait() is x
            np.testing.assert_array_equal(x, expected)


@pytest.mark.mpi
def test_sums_of_16_bits_are_rounded_once(comm: WindowCommunicator) -> None:
    one = np.full(300, 256 if comm.rank == 0 else 1, dtype_of("bfloat16"))
    expected = np.float32(255 + comm.size).astype(one.dtype)  # added one by one it would stay 256
    assert (comm.all_reduce(one).wait() == expected).all()
    assert (comm.reduce_scatter(one[: comm.size]).wait() == expected).all()
    np.testing.assert_array_equal(comm.all_gather(one).wait()[:300], np.full(300, 256, one.dtype))


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_is_late_sees_nothing_overwritten(comm: WindowCommunicator) -> None:
    """Others go ahead as far as there are slots, and no further, while the last rank is in no call of its."""
    n, count = 64, 3 * window.SLOTS
    xs = [np.full(n, 1000.0 * i + comm.rank) for i in range(count)]
    if comm.rank == comm.size - 1:
        comm.comm.recv(source=0, tag=7)
    pending = [comm.all_gather(x) for x in xs]
    if comm.rank == 0:
        for _ in range(100):
            assert not pending[-1].test()
        comm.comm.send(None, dest=comm.size - 1, tag=7)
    for i, each in enumerate(pending):
        np.testing.assert_array_equal(each.wait(), np.repeat(1000.0 * i + np.arange(comm.size), n))


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_waits_for_a_message_does_not_hold_up_a_sum(comm: WindowCommunicator) -> None:
    assert_a_waiting_rank_holds_up_no_sum(comm)


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_waits_for_a_sum_does_not_hold_up_a_large_message(comm: WindowCommunicator) -> None:
    """Rank 0 has sent it, and is in a sum that the receiver joins when the message is there: MPI must go on."""
    big = np.arange(500_000.0)
    if comm.rank == 0:
        sent = comm.send(big, 1)
    elif comm.rank == 1:
        np.testing.assert_array_equal(comm.recv(big.shape, big.dtype, 0, like=big).wait(), big)
    assert (comm.all_reduce(np.ones(100)).wait() == comm.size).all()
    if comm.rank == 0:
        sent.wait()


@pytest.mark.mpi
def test_other_sizes_and_what_is_no_number_go_the_way_of_mpi(world: Intracomm, monkeypatch: Any) -> None:
    comm = window.WindowCommunicator(world.Dup(), 2**16, dict.fromkeys(window.EVERY, (800, 1600)))
    made = []
    monkeypatch.setattr(window, "Transfer", lambda *args, **steps: made.append(args) or right(*args, **steps))
    for n, through in ((99, False), (100, world.size > 1), (199, world.size > 1), (200, False)):
        for call in (comm.all_reduce, comm.reduce_scatter, comm.broadcast):
            made.clear()
            call(np.ones(n)).wait()
            assert bool(made) is through, (n, call)
    made.clear()
    comm.all_reduce(np.ones(100, complex)).wait()
    assert not made
    comm.close()


right = window.Transfer


@pytest.mark.mpi
def test_without_room_mpi_does_it_and_the_log_says_so_once(world: Intracomm, caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(window, "_told", set())
    monkeypatch.setattr(window, "no_room", lambda size: "/dev/shm is full" if world.rank == 0 else "")
    for _ in range(2):
        comm = window.shared(world.Dup(), 2**20)
        assert not isinstance(comm, window.WindowCommunicator)
        assert (comm.all_reduce(np.ones(10**5)).wait() == world.size).all()
        comm.close()
    assert caplog.text.count("/dev/shm is full") == int(world.rank == 0 and world.size > 1)


def test_room() -> None:
    assert window.no_room(1) == ""
    assert "MiB left" in window.no_room(2**60)


@pytest.mark.mpi
def test_where_a_mesh_takes_it(world: Intracomm) -> None:
    """For groups within a node; never for one rank; "auto" where there is a core for every rank."""
    from hpcmp.comm.detect import cores

    one, each = Topology((0,) * world.size), Topology(tuple(range(world.size)))
    auto = world.size <= len(cores())
    for choice, topology, taken in (("auto", one, auto), ("yes", one, True), ("no", one, False), ("yes", each, False)):
        with Mesh(world, dp=world.size, topology=topology, shared_memory=choice, window_mb=0.25) as mesh:  # type: ignore[arg-type]
            group = mesh["dp"]
            assert isinstance(group, window.WindowCommunicator) is (taken and world.size > 1)
            if taken and world.size > 1:
                assert 4 * group.staging.slot == 2**18  # type: ignore[attr-defined]
                assert group.sizes is (window.EVERY if choice == "yes" else window.SIZES)  # type: ignore[attr-defined]


@pytest.mark.mpi
def test_sums_over_nodes_use_it_within_each(world: Intracomm) -> None:
    topology = Topology(tuple(2 * rank // world.size for rank in range(world.size)))
    with Mesh(world, dp=world.size, topology=topology, hierarchical="yes", shared_memory="yes") as mesh:
        x = whole_numbers(world.rank, 0, 5000)
        expected = sum(whole_numbers(rank, 0, 5000) for rank in range(world.size))
        np.testing.assert_array_equal(mesh["dp"].all_reduce(x).wait(), expected)
        if world.size >= 4:
            assert isinstance(mesh["dp"].inside, window.WindowCommunicator)  # type: ignore[attr-defined]
