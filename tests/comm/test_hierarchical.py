"""HierarchicalCommunicator: the sums of a flat one on any nodes, however late and in whatever order they are there."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hpcmp.comm import base
from hpcmp.comm.mesh import Mesh
from hpcmp.comm.topology import Topology
from tests.comm.cases import assert_a_waiting_rank_holds_up_no_sum, differences

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

    from hpcmp.comm.hierarchical import HierarchicalCommunicator

#: Nodes of equal and of unequal numbers of ranks, in order and not, for up to 8 ranks.
NODES = {
    "blocks": [0, 0, 1, 1, 2, 2, 3, 3],
    "cyclic": [0, 1, 0, 1, 0, 1, 0, 1],
    "unequal": [0, 0, 0, 1, 1, 2, 2, 2],
    "one alone": [0, 0, 0, 1, 0, 0, 0, 0],
    "one node": [0] * 8,
    "each alone": list(range(8)),
}


@pytest.fixture(params=NODES)
def comm(world: Intracomm, request: pytest.FixtureRequest) -> Iterator[HierarchicalCommunicator]:
    from hpcmp.comm.hierarchical import HierarchicalCommunicator

    made = HierarchicalCommunicator(
        world.Dup(), NODES[request.param][: world.size], staged=request.param == "cyclic", least=0
    )
    yield made
    made.close()


def whole_numbers(rank: int, i: int, n: int) -> np.ndarray:
    return np.random.default_rng((rank, i)).integers(-64, 64, n).astype(np.float64)


@pytest.mark.mpi
def test_equals_a_flat_communicator(world: Intracomm, comm: HierarchicalCommunicator) -> None:
    from hpcmp.comm.mpi import MpiCommunicator

    flat = MpiCommunicator(world.Dup())
    assert not differences(comm, flat, np)
    assert not base.DRIVERS
    flat.close()


@pytest.mark.mpi
def test_many_sums_tested_and_waited_for_in_another_order_on_each_rank(comm: HierarchicalCommunicator) -> None:
    """Ranks come to the end of a phase of different sums at different times, and must start the next in one order."""
    draw = random.Random(comm.rank)
    sizes = [5, 1000, 1, 0, 70_000, 13, 200, 3000]
    pending = []
    for i, n in enumerate(sizes):
        pending.append(comm.all_reduce(whole_numbers(comm.rank, i, n)))
        for each in draw.sample(pending, draw.randrange(len(pending) + 1)):
            each.test()
    for i in draw.sample(range(len(sizes)), len(sizes)):
        expected = sum(whole_numbers(rank, i, sizes[i]) for rank in range(comm.size))
        np.testing.assert_array_equal(pending[i].wait(), expected)
        assert pending[i].test()
    assert not base.DRIVERS


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_waits_for_something_else_does_not_hold_up_a_sum(comm: HierarchicalCommunicator) -> None:
    assert_a_waiting_rank_holds_up_no_sum(comm)


@pytest.mark.mpi
def test_the_same_bits_each_time_and_a_sum_to_rounding(comm: HierarchicalCommunicator) -> None:
    xs = [np.random.default_rng(rank).standard_normal(4321) for rank in range(comm.size)]
    first = comm.all_reduce(xs[comm.rank]).wait()
    np.testing.assert_array_equal(comm.all_reduce(xs[comm.rank]).wait(), first)
    np.testing.assert_allclose(first, np.sum(xs, 0), rtol=0, atol=1e-14)
    np.testing.assert_array_equal(comm.broadcast(first).wait(), first)  # on every rank


@pytest.mark.mpi
def test_sums_of_16_bits_are_rounded_once(comm: HierarchicalCommunicator) -> None:
    x = (np.random.default_rng(comm.rank).standard_normal(500)).astype(np.float16)
    every = comm.all_gather(x).wait().reshape(comm.size, -1).astype(np.float64)
    y = comm.all_reduce(x, out=x).wait()
    assert y is x
    np.testing.assert_array_equal(y, every.sum(0).astype(np.float32).astype(np.float16))


@pytest.mark.mpi
def test_small_messages_and_maxima_go_the_flat_way(world: Intracomm) -> None:
    from hpcmp.comm.hierarchical import HierarchicalCommunicator

    comm = HierarchicalCommunicator(world.Dup(), [rank % 2 for rank in range(world.size)], least=800)
    x = np.ones(100)
    for call in (lambda: comm.all_reduce(x[:99]), lambda: comm.all_reduce(x, "max")):
        call().wait()
        assert list(comm.traffic) == ["all_reduce"]
    comm.all_reduce(x).wait()
    assert list(comm.traffic) == ["all_reduce", "reduce_scatter", "all_gather"]
    comm.close()


@pytest.mark.mpi(size=3)
def test_between_three_nodes_a_rank_sends_two_thirds_of_its_part_twice(world: Intracomm) -> None:
    """And not all of it, as in halving and doubling; short messages are MPI's."""
    from hpcmp.comm.hierarchical import HierarchicalCommunicator

    comm = HierarchicalCommunicator(world.Dup(), range(3), least=0)
    n = 3 * 2**12 // 8
    for count, operations in ((n - 1, {"all_reduce"}), (n, {"all_to_all", "all_gather"})):
        comm.traffic.clear()
        comm.all_reduce(np.ones(count)).wait()
        assert {name for name, (_, sent) in comm.traffic.items() if sent} == operations
    assert [comm.traffic[name][1] for name in ("all_to_all", "all_gather")] == [8 * n * 2 // 3] * 2
    comm.close()


@pytest.mark.mpi
def test_closing_frees_every_communicator(world: Intracomm) -> None:
    from mpi4py import MPI

    from hpcmp.comm.hierarchical import HierarchicalCommunicator

    made = HierarchicalCommunicator(world.Dup(), [rank % 2 for rank in range(world.size)])
    parts = [made, *made._phases()]
    made.close()
    assert all(part.comm == MPI.COMM_NULL for part in parts)


def test_where_it_is_worthwhile() -> None:
    from hpcmp.comm.hierarchical import worthwhile

    for nodes in ([0, 0, 1, 1], [0, 1, 0, 1, 1], [0, 1, 2]):
        assert worthwhile(nodes) and not worthwhile(nodes, "no")
    for nodes in ([0, 0, 0], [0, 1, 2, 3], [0, 0, 1]):
        assert not worthwhile(nodes)
    assert worthwhile([0, 0, 1], "yes") and not worthwhile([0, 1, 2, 3], "yes")


@pytest.mark.mpi
def test_a_mesh_takes_it_for_groups_of_several_nodes(world: Intracomm) -> None:
    from hpcmp.comm.hierarchical import HierarchicalCommunicator

    topology = Topology(tuple(2 * rank // world.size for rank in range(world.size)))
    for choice, taken in (("auto", world.size >= 4), ("yes", world.size >= 3), ("no", False)):
        with Mesh(world, dp=world.size, topology=topology, hierarchical=choice) as mesh:  # type: ignore[arg-type]
            assert isinstance(mesh["dp"], HierarchicalCommunicator) is taken
        with Mesh(world, dp=world.size, topology=Topology((0,) * world.size), hierarchical=choice) as mesh:  # type: ignore[arg-type]
            assert not isinstance(mesh["dp"], HierarchicalCommunicator)
