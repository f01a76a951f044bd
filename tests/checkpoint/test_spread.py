"""Loading what is spread over nodes, after a loss, a move or damage: whole, or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hpcmp.errors import CheckpointError
from tests.checkpoint.cases import assert_filled, assert_untouched, targets
from tests.checkpoint.on_nodes import NODES, alone, nodes, save, stored, tier

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

mpi = pytest.mark.mpi
several = pytest.mark.mpi(min_size=2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def copies(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"node*/this/step_*/{name}"))


@several
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_node_gets_its_part_from_its_partner(world: Intracomm, mpi_tmp_path: Path, lost: int) -> None:
    with tier(world, mpi_tmp_path) as made:
        save(made, 1, 2)
    before = {node: stored(mpi_tmp_path, node)["step_00000002"] for node in nodes(world)}
    alone(world, lambda: shutil.rmtree(mpi_tmp_path / f"node{lost}"))
    with tier(world, mpi_tmp_path) as made:
        checkpoint = made.checkpoints()[0]
        slabs = targets(made.mesh)
        checkpoint.load(slabs)
        assert_filled(slabs, 2)
        world.Barrier()
        for (
            node,
            files,
        ) in before.items():  # nothing that was fetched for its numbers alone stays, and no copy is missing
            assert stored(mpi_tmp_path, node) == {"step_00000002": files}
        assert save(made, 3)
        assert [c.step for c in made.checkpoints()] == [3, 2]


@several
def test_two_neighbours_lost_are_too_many(
    world: Intracomm, mpi_tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Which is told, unless an ordinary checkpoint is newer."""
    with tier(world, mpi_tmp_path) as made:
        save(made, 1)

    def lose() -> None:
        for node in (0, 1):
            shutil.rmtree(mpi_tmp_path / f"node{node}")

    alone(world, lose)
    with tier(world, mpi_tmp_path) as made:
        assert made.checkpoints("9999-01-01") == [] and caplog.text == ""
        made.known = True
        assert made.checkpoints() == []
    told = [record.getMessage() for record in caplog.records]
    lost = sum(node == "0" for node in NODES[world.size].split(","))  # node 1 has its second copies
    if len(nodes(world)) > 2:
        expected = f"local checkpoint of step 1: {lost} of its {world.size} files are on no node here"
    else:
        expected = "checkpoint.local: there is no step of this run on its nodes"
    assert told == ([expected] if world.rank == 0 else [])


@several
def test_nodes_may_change_places(world: Intracomm, mpi_tmp_path: Path) -> None:
    """After a restart another node is the first: what it has is another ranks'."""
    with tier(world, mpi_tmp_path) as made:
        save(made, 1)

    def swap() -> None:
        (mpi_tmp_path / "node0").rename(mpi_tmp_path / "other")
        (mpi_tmp_path / "node1").rename(mpi_tmp_path / "node0")
        (mpi_tmp_path / "other").rename(mpi_tmp_path / "node1")

    alone(world, swap)
    with tier(world, mpi_tmp_path) as made:
        slabs = targets(made.mesh)
        made.checkpoints()[0].load(slabs)
        assert_filled(slabs, 1)


@several
def test_another_layout_loads_it_too(world: Intracomm, mpi_tmp_path: Path) -> None:
    with tier(world, mpi_tmp_path, tp=world.size) as made:
        save(made, 1)
    for axes in ({"dp": world.size}, {"pp": world.size}):
        with tier(world, mpi_tmp_path, **axes) as made:
            slabs = targets(made.mesh)
            made.checkpoints()[0].load(slabs)
            assert_filled(slabs, 1)


@several
@pytest.mark.parametrize("fewer", [True, False])
def test_another_number_of_ranks_loads_it_too(world: Intracomm, mpi_tmp_path: Path, fewer: bool) -> None:
    """A rank a node, of as many nodes as can be spared; and the other way round."""
    part = world.Split(0 if world.rank % 2 == 0 else 1)
    first, then = (world, part) if fewer else (part, world)
    if first is world or world.rank % 2 == 0:
        with tier(first, mpi_tmp_path, nodes=NODES[world.size]) as made:
            save(made, 1)
    world.Barrier()
    if then is world or world.rank % 2 == 0:
        with tier(then, mpi_tmp_path, nodes=NODES[world.size]) as made:
            slabs = targets(made.mesh)
            made.checkpoints()[0].load(slabs)
            assert_filled(slabs, 1)
    world.Barrier()
    part.Free()


@several
def test_a_flipped_bit_is_mended_by_the_copy(
    world: Intracomm, mpi_tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tier(world, mpi_tmp_path) as made:
        save(made, 1, 2)
    victim = next(path for path in copies(mpi_tmp_path, "rank_00000.h5") if "step_00000002" in str(path))
    alone(world, lambda: flip(victim))
    with tier(world, mpi_tmp_path) as made:
        slabs = targets(made.mesh)
        made.checkpoints()[0].load(slabs)
        assert_filled(slabs, 2)
    whole = {path.read_bytes() for path in copies(mpi_tmp_path, "rank_00000.h5") if "step_00000002" in str(path)}
    assert len(whole) == 1  # the copy has taken its place
    assert (caplog.text.count("looking for its copy") == 1) is (world.rank == 0)


@several
def test_no_copy_is_sound(world: Intracomm, mpi_tmp_path: Path) -> None:
    """Nothing changes, and the one before can be taken."""
    with tier(world, mpi_tmp_path) as made:
        save(made, 1, 2)
    victims = [path for path in copies(mpi_tmp_path, "rank_00000.h5") if "step_00000002" in str(path)]
    assert len(victims) == 2
    alone(world, lambda: [flip(path) for path in victims])
    with tier(world, mpi_tmp_path) as made:
        newest, older = made.checkpoints()
        slabs = targets(made.mesh)
        with pytest.raises(CheckpointError, match="local checkpoint of step 2: .*rank_00000.h5 is on no node any more"):
            newest.load(slabs)
        assert_untouched(slabs)
        older.load(slabs)
        assert_filled(slabs, 1)
        assert [c.step for c in made.checkpoints()] == [1]


@mpi
@pytest.mark.parametrize("cut", ["manifest.json", "rank_00000.h5"])
def test_a_shortened_file_is_none(world: Intracomm, mpi_tmp_path: Path, cut: str) -> None:
    with tier(world, mpi_tmp_path) as made:
        save(made, 1)

    def shorten() -> None:
        for path in copies(mpi_tmp_path, cut):
            path.write_bytes(path.read_bytes()[:-1])

    alone(world, shorten)
    with tier(world, mpi_tmp_path) as made:
        assert made.checkpoints() == []
