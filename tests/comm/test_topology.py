"""Topology: nodes by shared memory or by HPCMP_NODES, the order of ranks, and where a mesh's axes then lie."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.comm.mesh import Mesh
from hpcmp.comm.topology import Topology, find, of_keys, planned, switches_above
from hpcmp.errors import InputError
from hpcmp.training.verify import source_of, verify
from tests.layouts import small, spread

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


def cyclic(ranks: int, nodes: int = 2) -> Topology:
    return Topology(tuple(rank % min(nodes, ranks) for rank in range(ranks)))


def test_nodes_are_numbered_by_their_lowest_ranks() -> None:
    found = of_keys([(7, "b", ""), (3, "a", "s"), (7, "b", ""), (9, "c", "")])
    assert found == Topology((0, 1, 0, 2), ("b", "a", "c"), ("", "s", ""))
    assert found.sizes == [2, 1, 1]


def test_ranks_in_blocks_stay_as_they_are_and_others_are_sorted() -> None:
    assert Topology((0, 0, 1, 1, 2)).order == [0, 1, 2, 3, 4]
    assert Topology((0, 1, 0, 1, 2)).order == [0, 2, 1, 3, 4]
    assert Topology((0, 1, 0, 1, 2)).placed.nodes == (0, 0, 1, 1, 2)
    assert Topology((0, 0, 1)).in_order and not cyclic(4).in_order


@pytest.mark.parametrize("seed", range(20))
def test_any_placement_is_sorted_by_node_and_rank_0_stays_first(seed: int) -> None:
    draw = random.Random(seed)
    keys = [(draw.randrange(5), "", draw.choice(["", "a", "a.b", "a.c", "d"])) for _ in range(draw.randrange(1, 20))]
    found = of_keys(keys)
    order = found.order
    assert sorted(order) == list(range(len(keys))) and order[0] == 0
    runs = [node for node, _ in itertools.groupby(found.nodes[rank] for rank in order)]
    assert len(runs) == len(set(runs))  # each node is one run
    for _, group in itertools.groupby(order, lambda rank: found.nodes[rank]):
        ranks = list(group)
        assert ranks == sorted(ranks)


def test_nodes_of_a_switch_stand_together() -> None:
    switches = ("core.x", "core.y", "core.x", "far.z", "core.y")
    found = Topology((0, 1, 2, 3, 4), (), switches)
    assert found.order == [0, 2, 1, 4, 3]
    assert str(found) == "5 nodes of 1 rank on 3 switches"


def test_the_switches_of_slurm() -> None:
    environ = {"SLURM_TOPOLOGY_ADDR": "core.leaf3.node17", "SLURM_TOPOLOGY_ADDR_PATTERN": "switch.switch.node"}
    assert switches_above(environ) == "core.leaf3"
    assert switches_above({}) == ""
    assert switches_above(environ | {"SLURM_TOPOLOGY_ADDR": "core.leaf3.node17.example.org"}) == ""


def test_a_plan_of_nodes_begins_again_after_its_end() -> None:
    assert [planned("0,0,1", rank) for rank in range(5)] == [0, 0, 1, 0, 0]
    for text in ("", "0,", "a", "-1", "0;1"):
        with pytest.raises(InputError, match="HPCMP_NODES"):
            planned(text, 0)


def test_in_words() -> None:
    assert str(Topology((0, 0))) == "2 ranks on one node"
    assert str(Topology((0, 0, 1, 1))) == "2 nodes of 2 ranks"
    assert str(Topology((0, 0, 1))) == "2 nodes of 1 to 2 ranks"


@pytest.mark.mpi
def test_this_machine_is_one_node(world: Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPCMP_NODES", raising=False)
    assert find(world).nodes == (0,) * world.size
    assert find(None) == Topology()


@pytest.mark.mpi
def test_nodes_by_the_environment_are_those_of_the_jobs_ranks(
    world: Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a communicator of some of the ranks, too."""
    monkeypatch.setenv("HPCMP_NODES", "0,1,1")
    nodes = [(0, 1, 1)[rank % 3] for rank in range(world.size)]
    assert find(world).nodes == tuple(nodes)
    half = world.Split(world.rank % 2, -world.rank)  # in the opposite order
    mine = [nodes[rank] for rank in reversed(range(world.rank % 2, world.size, 2))]
    assert [node == mine[0] for node in mine] == [node == 0 for node in find(half).nodes]
    half.Free()


@pytest.mark.mpi
def test_a_mesh_sorts_its_ranks(world: Intracomm) -> None:
    """Groups, objects and coordinates go by the sorted numbers, and rank 0 is the caller's."""
    topology = cyclic(world.size)
    with Mesh(world, dp=world.size, topology=topology) as mesh:
        assert mesh.rank == topology.order.index(world.rank)
        assert mesh.gather_objects(world.rank) == topology.order
        assert mesh["dp"].rank == mesh.coordinates["dp"] == mesh.rank
        assert mesh.comm is not None and mesh.comm.rank == mesh.rank
        assert world.bcast(mesh.rank) == 0


@pytest.mark.mpi
@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_spans_by_their_definition(world: Intracomm, nodes: int) -> None:
    axes = ("dp", "pp", "tp")
    divisors = [n for n in range(1, world.size + 1) if world.size % n == 0]
    for shape in itertools.product(divisors, repeat=3):
        if shape[0] * shape[1] * shape[2] != world.size:
            continue
        given: dict[str, Any] = dict(zip(axes, shape, strict=True))
        with Mesh(world, topology=cyclic(world.size, nodes), **given) as mesh:
            for axis in axes:
                here = len({mesh.topology.nodes[rank] for rank in mesh.members(frozenset({axis}))})
                assert mesh.spans()[axis] == max(world.allgather(here))


def assert_tensor_parallel_groups_stay_on_a_node(world: Intracomm) -> None:
    with Mesh(world, dp=2, tp=world.size // 2, topology=cyclic(world.size)) as mesh:
        nodes = mesh["tp"].all_gather(np.array([world.rank % 2])).wait()
        assert len(set(nodes.tolist())) == 1, "a tp group crosses nodes"


@pytest.mark.mpi(min_size=4)
def test_tensor_parallel_groups_stay_on_a_node(world: Intracomm) -> None:
    if world.size % 2:
        pytest.skip("4 or 8 ranks show it")
    assert_tensor_parallel_groups_stay_on_a_node(world)
    with Mesh(world, dp=2, tp=world.size // 2, topology=cyclic(world.size)) as mesh:
        assert mesh.spans() == {axis: 1 + (axis == "dp") for axis in mesh.axes}
        assert (mesh.describe(), mesh.advice()) == (
            f"2 nodes of {world.size // 2} ranks, sorted by node: tp within a node; dp over 2",
            "",
        )


@pytest.mark.mpi
def test_a_tp_group_that_crosses_nodes_although_it_would_fit_is_told(world: Intracomm) -> None:
    if world.size != 4:
        pytest.skip("4 ranks show it")
    with Mesh(world, dp=2, tp=2, topology=Topology((0, 0, 0, 1))) as mesh:
        advice = mesh.advice()
        assert advice.startswith("layout.tp = 2 crosses nodes") and "no size but 1 would stay" in advice
    with Mesh(world, tp=4, topology=Topology((0, 0, 1, 1))) as mesh:
        assert mesh.spans()["tp"] == 2 and mesh.advice() == ""  # it fits on no node
    with Mesh(world, dp=4, topology=Topology((0, 0, 1, 1))) as mesh:
        assert (mesh.describe(), mesh.advice()) == ("2 nodes of 2 ranks: dp over 2", "")


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("choice", ["auto", "yes"])
def test_the_numbers_are_the_same_on_any_topology(
    world: Intracomm, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCMP_NODES", "0,1,1" if choice == "yes" else "0,1")
    config = small(hierarchical=choice, dropout=0.1)
    texts = [f"dp={world.size}", f"tp={world.size}", f"pp={world.size}"]
    if world.size % 2 == 0:
        texts += [f"tp=2,dp={world.size // 2}", f"dp=2,cp={world.size // 2},zero=3"]
        texts += [f"pp=2,dp={world.size // 2},schedule=zb-h1,micro=2"]
    for report in verify([spread(config, text) for text in texts], world, source_of(config)):
        assert report.worst <= 1e-12
