"""Mesh: coordinates, the group along any set of axes, and communicators that are freed."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.comm.base import Solo
from hpcmp.comm.mesh import Mesh
from hpcmp.comm.topology import Topology
from hpcmp.errors import InputError

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

AXES = ("dp", "pp", "tp")


def grids(size: int) -> list[dict[str, Any]]:
    """Every dp x pp x tp = size."""
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    return [
        dict(zip(AXES, shape, strict=True)) for shape in itertools.product(divisors, repeat=3) if np.prod(shape) == size
    ]


def place(rank: int, shape: dict[str, Any]) -> dict[str, int]:
    """Coordinates in C order, by NumPy."""
    return {axis: int(i) for axis, i in zip(AXES, np.unravel_index(rank, tuple(shape.values())), strict=True)}


def test_the_serial_mesh_needs_no_mpi() -> None:
    with Mesh() as mesh:
        assert (mesh.rank, mesh.size, mesh.coordinates) == (0, 1, dict.fromkeys(mesh.coordinates, 0))
        for axes in ("dp", "tp", ("dp", "pp", "tp"), "ends"):
            assert isinstance(mesh[axes], Solo)
        assert mesh.gather_objects({"a": 1}) == [{"a": 1}]


@pytest.mark.parametrize(
    ("axes", "ranks", "fits"),
    [
        ({"dp": 4, "tp": 2}, 4, "dp=2 or tp=1"),
        ({"dp": 2, "tp": 4, "ep": 2}, 4, "tp=2"),  # one replica could not share experts
        ({"dp": 2, "pp": 3, "tp": 5}, 4, "dp=4 alone"),
        ({"cp": 4, "ulysses": 4, "pp": 2}, 12, "pp=3"),
    ],
)
def test_sizes_that_do_not_make_the_ranks_are_told_what_would(axes: dict[str, int], ranks: int, fits: str) -> None:
    class Ranks:
        size = ranks

    with pytest.raises(InputError, match=rf"and there are {ranks}; {fits} would fit$"):
        Mesh(Ranks(), **axes)  # type: ignore[arg-type]
    shape = {axis: n for axis, n in axes.items() if axis not in ("ep", "ulysses")}
    for text in fits.removesuffix(" alone").split(" or "):
        axis, n = text.split("=")
        with pytest.raises(AttributeError):  # it goes on, to the first thing that it does with the ranks
            kept = {} if "alone" in fits else axes
            Mesh(Ranks(), **kept | {axis: int(n)})  # type: ignore[arg-type]
    assert np.prod(list(shape.values())) != ranks


@pytest.mark.mpi
def test_a_topology_of_other_ranks_is_refused(world: Intracomm) -> None:
    with pytest.raises(ValueError, match="the topology is of"):
        Mesh(world, dp=world.size, topology=Topology((0,) * (world.size + 1)))


def test_a_serial_mesh_of_several_ranks_is_refused() -> None:
    with pytest.raises(InputError, match=r"layout: dp=1 x pp=3 x tp=2 needs 6 ranks, and there are 1"):
        Mesh(pp=3, tp=2)


@pytest.mark.mpi
def test_a_product_that_is_not_the_number_of_ranks_is_refused(world: Intracomm) -> None:
    with pytest.raises(InputError, match=rf"layout: dp=2 x pp=1 x tp={world.size} needs {2 * world.size} ranks"):
        Mesh(world, dp=2, tp=world.size)


@pytest.mark.mpi
def test_coordinates_and_every_group(world: Intracomm) -> None:
    """Each group has the ranks that share this rank's other coordinates, in order."""
    subsets = [axes for n in range(4) for axes in itertools.combinations(AXES, n)]
    for shape in grids(world.size):
        with Mesh(world, **shape) as mesh:
            assert {axis: mesh.coordinates[axis] for axis in AXES} == place(world.rank, shape)
            for axes in subsets:
                here = place(world.rank, shape)
                same = [
                    rank
                    for rank in range(world.size)
                    if all(place(rank, shape)[axis] == here[axis] for axis in AXES if axis not in axes)
                ]
                group = mesh[axes]
                assert mesh.members(frozenset(axes)) == same
                assert (group.size, group.rank) == (len(same), same.index(world.rank))
                found = group.all_gather(np.array([world.rank])).wait()
                np.testing.assert_array_equal(found, same)
                assert mesh[axes[::-1]] is group  # one group for a set of axes, however it is asked for
            assert mesh["tp"] is mesh[("tp",)]


@pytest.mark.mpi
def test_ends_are_the_first_and_the_last_stage(world: Intracomm) -> None:
    for shape in grids(world.size):
        with Mesh(world, **shape) as mesh:
            here, last = mesh.coordinates, shape["pp"] - 1
            if here["pp"] not in (0, last):
                with pytest.raises(ValueError, match="between the ends of the pipeline"):
                    mesh["ends"]
                continue
            ends = sorted({tuple((here | {"pp": i})[axis] for axis in AXES) for i in (0, last)})
            expected = [int(np.ravel_multi_index(end, tuple(shape.values()))) for end in ends]
            np.testing.assert_array_equal(mesh["ends"].all_gather(np.array([world.rank])).wait(), expected)
            wide = mesh["dp", "ends"].all_gather(np.array([world.rank])).wait()
            dp = [place(rank, shape)["dp"] for rank in wide]
            assert len(wide) == len(expected) * shape["dp"]
            assert dp == sorted(dp)
            assert {place(rank, shape)["pp"] for rank in wide} == {0, last}
            assert {place(rank, shape)["tp"] for rank in wide} == {here["tp"]}


CUTS = (("dp", "cp", "tp_z"), ("dp", "ring", "ulysses", "tp_z"), ("edp", "ep"), ("copy", "shard"))
CUTS += (("ecopy", "eshard", "ep"),)


def cut_grids(size: int) -> list[dict[str, Any]]:
    """Every cut of every dp x cp x tp_z of up to ``size`` ranks that leaves a divisor of them to pp x tp."""
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    found = []
    for dp, cp, tp_z, tp in itertools.product(divisors, repeat=4):
        data = dp * cp * tp_z
        if size % (data * tp):
            continue
        for ulysses, ep, shard in itertools.product(divisors, repeat=3):
            if cp % ulysses == data % ep == data % shard == 0 and (shard % ep == 0 or ep % shard == 0):
                axes = {"dp": dp, "pp": size // data // tp, "cp": cp, "tp_z": tp_z, "tp": tp}
                found.append(axes | {"ulysses": ulysses, "ep": ep, "shard": shard})
    return found


def sizes(grid: dict[str, Any], cut: tuple[str, ...]) -> list[int]:
    data, ep, shard = grid["dp"] * grid["cp"] * grid["tp_z"], grid["ep"], grid["shard"]
    eshard = max(1, shard // ep)
    all_sizes = grid | {"ring": grid["cp"] // grid["ulysses"], "edp": data // ep, "copy": data // shard}
    all_sizes |= {"ecopy": data // ep // eshard, "eshard": eshard}
    return [all_sizes[axis] for axis in cut]


@pytest.mark.mpi
def test_groups_of_every_cut_by_their_definition(world: Intracomm) -> None:
    """dp x cp x tp_z, in C order, as a table of each cut's shape: a group is what slicing it along its axes gives."""
    grids = cut_grids(world.size)
    for grid in grids[:: max(1, len(grids) // 25)]:
        outer = (grid["dp"], grid["pp"], grid["cp"], grid["tp_z"], grid["tp"])
        data_first = np.arange(world.size).reshape(outer).transpose(0, 2, 3, 1, 4)  # dp, cp, tp_z, pp, tp
        with Mesh(world, **grid) as mesh:
            for cut in CUTS:
                table = data_first.reshape(*sizes(grid, cut), grid["pp"], grid["tp"])
                names = (*cut, "pp", "tp")
                here = [int(i[0]) for i in np.nonzero(table == world.rank)]
                assert [mesh.coordinates[axis] for axis in names] == here
                for n in range(len(names) + 1):
                    for axes in itertools.combinations(names, n):
                        index = tuple(slice(None) if a in axes else i for a, i in zip(names, here, strict=True))
                        members = mesh.members(frozenset(axes))
                        assert members == sorted(table[index].ravel().tolist()), (grid, axes)
            for axes in ("ring", "ulysses", "ep", "edp", "shard", "copy", "eshard", ("ecopy", "tp")):
                group = mesh[axes]
                found = group.all_gather(np.array([world.rank])).wait()
                assert found.tolist() == mesh.members(frozenset((axes,) if isinstance(axes, str) else axes))


@pytest.mark.mpi
def test_numbers_within_a_group_are_places_on_its_axis(world: Intracomm) -> None:
    """What is sliced by ``coordinates`` and what by a group's rank is the same slice."""
    for grid in cut_grids(world.size)[::7]:
        with Mesh(world, **grid) as mesh:
            for axis in ("dp", "pp", "cp", "tp_z", "tp", "ring", "ulysses", "edp", "ep", "copy", "shard", "ecopy"):
                assert mesh.members(frozenset({axis}))[mesh.coordinates[axis]] == world.rank


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"cp": 4, "ulysses": 3}, r"layout.ulysses = 3 does not divide layout.cp = 4; 1, 2 or 4 would fit"),
        ({"dp": 4, "ep": 3}, r"layout.ep = 3 does not divide layout.dp = 4; 1, 2 or 4 would fit"),
        ({"dp": 2, "cp": 3, "ep": 4}, r"layout.ep = 4 does not divide layout.dp x layout.cp = 6; 1, 2, 3 or 6 would"),
        ({"dp": 6, "shard": 4}, r"layout.zero_group = 4 does not divide layout.dp = 6; 1, 2, 3 or 6 would fit"),
        ({"dp": 6, "shard": 2, "ep": 3}, r"neither divides the other; for layout.zero_group 1, 3 or 6 would fit"),
        ({"dp": 6, "shard": 2, "ep": 4}, r"layout.ep = 4 does not divide layout.dp = 6; 1, 2 or 6 would fit"),
        ({"dp": 6, "shard": 4, "ep": 5}, r"layout.ep = 5 .*; layout.zero_group = 4 .*; 1 or 6 would fit"),
    ],
)
def test_cuts_that_do_not_divide_are_refused_with_what_would_fit(axes: dict[str, int], message: str) -> None:
    class Ranks:
        size = axes.get("dp", 1) * axes.get("cp", 1)

    with pytest.raises(InputError, match=message):
        Mesh(Ranks(), **axes)  # type: ignore[arg-type]


@pytest.mark.mpi
def test_tp_varies_fastest(world: Intracomm) -> None:
    """So that tensor parallelism stays on a node."""
    for tp in (n for n in range(1, world.size + 1) if world.size % n == 0):
        with Mesh(world, dp=world.size // tp, tp=tp) as mesh:
            first = world.rank // tp * tp
            assert mesh.members(frozenset({"tp"})) == list(range(first, first + tp))


@pytest.mark.mpi
def test_an_unknown_axis_is_refused(world: Intracomm) -> None:
    with Mesh(world, tp=world.size) as mesh:
        wrong = [("tp", "sp"), ("dp", "ep"), ("edp", "shard"), ("ring", "ep"), ("cp", "ulysses"), ("copy", "eshard")]
        for axes in wrong:
            with pytest.raises(ValueError, match=f"no group along .*'{axes[0]}'.* not of one cut"):
                mesh[axes]


@pytest.mark.mpi
def test_gather_objects_is_in_order_of_rank(world: Intracomm) -> None:
    with Mesh(world, tp=world.size) as mesh:
        found: list[Any] = mesh.gather_objects({"rank": world.rank})
        assert found == [{"rank": rank} for rank in range(world.size)]


@pytest.mark.mpi
def test_messages_of_two_meshes_and_of_the_caller_do_not_mix(world: Intracomm) -> None:
    """Each group duplicates: a message of the caller's, or of another mesh, is never taken for one of its own."""
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    with Mesh(world, tp=world.size) as one, Mesh(world, tp=world.size) as two:
        if world.size == 1:
            return
        like = np.empty(0)
        mine = [world.Isend(np.array([0.0]), after)]
        sent = [mesh["tp"].send(np.array([float(i)]), after) for i, mesh in ((2, two), (1, one))]
        assert one["tp"].recv((1,), np.float64, before, like=like).wait() == 1
        assert two["tp"].recv((1,), np.float64, before, like=like).wait() == 2
        buffer = np.empty(1)
        world.Recv(buffer, before)
        assert buffer == 0
        for pending in sent:
            pending.wait()
        mine[0].Wait()


@pytest.mark.mpi
def test_close_frees_and_leaves_the_callers_communicator_alone(world: Intracomm) -> None:
    from mpi4py import MPI

    mesh = Mesh(world, tp=world.size)
    group = mesh["tp"]
    assert mesh.comm is not None
    assert MPI.Comm.Compare(mesh.comm, world) == MPI.CONGRUENT  # the same ranks, another communicator
    mesh.close()
    mesh.close()  # once more does nothing
    if world.size > 1:
        assert group.comm == MPI.COMM_NULL  # type: ignore[attr-defined]
    world.Barrier()


@pytest.mark.mpi
def test_after_an_error_nothing_waits_for_the_other_ranks(world: Intracomm) -> None:
    """Leaving on an error must not free, which is collective: the others may never come."""
    meshes = []
    with pytest.raises(KeyError):
        with Mesh(world, tp=world.size) as mesh:
            meshes.append(mesh)
            raise KeyError
    assert meshes[0].comm is not None
    meshes[0].close()


@pytest.mark.mpi
def test_many_meshes_leave_no_communicator_behind(world: Intracomm) -> None:
    """An MPI has a few thousand at most (MPICH 2,048)."""
    from mpi4py import MPI

    made: list[Any] = []
    for _ in range(300):
        with Mesh(world, dp=world.size) as mesh:
            made += [mesh.comm, *(getattr(mesh[axes], "comm", None) for axes in ("dp", "ends"))]
            assert mesh["dp"].size == world.size
    assert all(comm in (None, MPI.COMM_NULL) for comm in made)
