"""Traffic: what each operation counts, held against its algorithm carried out message by message."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp import partition
from hpcmp.comm.base import Communicator, Solo
from hpcmp.comm.mesh import Mesh
from hpcmp.comm.topology import Topology
from hpcmp.comm.traffic import Traffic, all_reduced

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


def ring_all_reduce(elements: int, size: int) -> Counter[int]:
    """Elements that each rank sends: equal parts go around a ring twice, once to be summed, once to be spread."""
    sent: Counter[int] = Counter()
    parts = partition.sizes(elements, size)
    for step in range(2 * (size - 1)):
        for rank in range(size):
            sent[rank] += parts[(rank - step) % size]
    return sent


@pytest.mark.parametrize("size", range(1, 9))
def test_an_all_reduce_sends_what_a_ring_sends(size: int) -> None:
    """Exactly for equal parts; over all ranks for any."""
    for elements in (0, 1, 5, 3 * size, 8 * size + 1):
        ring, counted = ring_all_reduce(elements, size), [all_reduced(elements, size, rank) for rank in range(size)]
        assert sum(counted) == sum(ring.values()) == 2 * (size - 1) * elements
        if elements % size == 0:
            assert counted == [ring[rank] for rank in range(size)] == [2 * (size - 1) * elements // size] * size


def calls(c: Communicator, total: int, dtype: Any) -> None:
    """Every operation once, on shards of ``total`` rows of 3 elements."""
    whole, part = np.zeros((total, 3), dtype), np.zeros((partition.sizes(total, c.size)[c.rank], 3), dtype)
    rows = [3 * rank for rank in range(c.size)]
    waiting = [
        c.all_reduce(whole),
        c.all_gather(part, 0, total),
        c.reduce_scatter(whole),
        c.all_to_all(part, 1, 0, total),
        c.all_gather_v(np.zeros((rows[c.rank], 2), dtype), rows),
        c.reduce_scatter_v(np.zeros((sum(rows), 2), dtype), rows),
        c.all_to_all_v(np.zeros((sum(rows), 2), dtype), rows, [rows[c.rank]] * c.size),
        c.broadcast(whole, c.size - 1),
    ]
    for pending in waiting:
        pending.wait()


def expected(n: int, rank: int, total: int, item: int) -> dict[str, tuple[int, int]]:
    """The same, each message to another rank counted."""
    others = [r for r in range(n) if r != rank]
    parts, columns, rows = partition.sizes(total, n), partition.sizes(3, n), [3 * r for r in range(n)]
    mine, triple = partition.sizes(3 * total, n), item * 3
    reduce = sum(mine[r] for r in others) + sum(mine[rank] for _ in others)
    return {
        "all_reduce": (1, item * reduce),
        "all_gather": (2, sum(triple * parts[rank] + item * 2 * rows[rank] for _ in others)),
        "reduce_scatter": (2, sum(triple * parts[r] + item * 2 * rows[r] for r in others)),
        "all_to_all": (2, sum(item * parts[rank] * columns[r] + item * 2 * rows[r] for r in others)),
        "broadcast": (1, 0 if rank == (n - 2) % n else triple * total),
    }


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_operation(world: Intracomm, dtype: Any) -> None:
    for total in (2 * world.size, 13, 1, 0):
        with Mesh(world, dp=world.size) as mesh:
            group, item = mesh["dp"], np.dtype(dtype).itemsize
            calls(group, total, dtype)
            if world.size == 1:
                assert not group.traffic and not mesh.traffic()
                continue
            assert group.traffic == expected(world.size, world.rank, total, item)
            assert mesh.traffic() == {("dp",): group.traffic}
            assert group.traffic.sent == sum(sent for _, sent in group.traffic.values())
            mesh.forget_traffic()
            assert not group.traffic and not mesh.traffic()


@pytest.mark.mpi
def test_messages_count_for_their_sender(world: Intracomm) -> None:
    with Mesh(world, pp=world.size) as mesh:
        pp = mesh["pp"]
        if pp.rank > 0:
            pp.recv((4,), np.float32, pp.rank - 1, like=np.empty(0)).wait()
        if pp.rank < pp.size - 1:
            pp.send(np.zeros(4, np.float32), pp.rank + 1).wait()
            assert mesh.traffic() == {("pp",): {"send": (1, 16)}}
        else:
            assert mesh.traffic() == {}


@pytest.mark.mpi
def test_sums_of_16_bits_go_over_mpi_in_32(world: Intracomm) -> None:
    with Mesh(world, dp=world.size) as mesh:
        mesh["dp"].all_reduce(np.zeros(world.size, np.float16)).wait()
        assert mesh["dp"].traffic.sent == 4 * 2 * (world.size - 1)


@pytest.mark.mpi(min_size=4)
def test_a_sum_in_phases_counts_the_messages_of_its_phases(world: Intracomm) -> None:
    if world.size % 2:
        pytest.skip("4 or 8 ranks show it")
    size, local = 5 * world.size, world.size // 2
    topology = Topology(tuple(rank // local for rank in range(world.size)))
    with Mesh(world, dp=world.size, topology=topology, hierarchical="yes") as mesh:
        mesh["dp"].all_reduce(np.zeros(size)).wait()
        inside = 8 * (local - 1) * size // local
        across = 8 * size // local  # 2 (m - 1) / m for m = 2 nodes
        assert mesh.traffic() == {
            ("dp",): {"reduce_scatter": (1, inside), "all_reduce": (1, across), "all_gather": (1, inside)}
        }


@pytest.mark.mpi
def test_groups_are_named_by_their_axes_in_order(world: Intracomm) -> None:
    with Mesh(world, dp=world.size) as mesh:
        for axes in (("tp", "dp"), ("ep", "edp"), "cp"):
            mesh[axes].all_reduce(np.zeros(2)).wait()
        found = [("dp", "tp"), ("edp", "ep")] if world.size > 1 else []
        assert list(mesh.traffic()) == found


@pytest.mark.mpi
def test_nccl_counts_as_mpi_does(world: Intracomm) -> None:
    from hpcmp.comm.mpi import MpiCommunicator
    from hpcmp.comm.nccl import NcclCommunicator
    from tests.comm.test_nccl import model

    nccl, mpi = NcclCommunicator(MpiCommunicator(world.Dup()), model(world)), MpiCommunicator(world.Dup())
    for on_device in (True, False):
        nccl.library.device = on_device  # type: ignore[attr-defined]
        for c in (nccl, mpi):
            calls(c, 13, np.float32)
    assert nccl.traffic == mpi.traffic and not nccl.control.traffic
    for c in (nccl, mpi):
        c.close()


def test_a_group_of_one_counts_nothing() -> None:
    solo = Solo()
    calls(solo, 5, np.float32)
    assert solo.traffic == {} and solo.traffic.sent == 0


def test_counting() -> None:
    traffic = Traffic()
    for sent in (3, 0, 4):
        traffic.count("send", sent)
    traffic.count("broadcast", 2)
    assert traffic == {"send": (3, 7), "broadcast": (1, 2)} and traffic.sent == 9
