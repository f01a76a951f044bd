"""The run's own directory on a node: nothing else is read, written or removed, whatever someone plants in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hpcmp.checkpoint import local_steps
from hpcmp.checkpoint.tier import LocalTier
from hpcmp.comm.mesh import Mesh
from tests.checkpoint.cases import assert_filled, targets
from tests.checkpoint.on_nodes import alone, save, tier

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

mpi = pytest.mark.mpi
TEXT = b"somebody else's"


def outside(folder: Path) -> Path:
    """A directory with something in it that must stay as it is."""
    place = folder / "outside"
    place.mkdir()
    for name in ("manifest.json", "rank_00000.h5", "precious"):
        (place / name).write_bytes(TEXT)
    return place


def assert_as_it_was(place: Path) -> None:
    assert {path.name: path.read_bytes() for path in place.iterdir()} == dict.fromkeys(
        ("manifest.json", "rank_00000.h5", "precious"), TEXT
    )


@mpi
def test_leftovers_are_swept_and_strange_things_stay(world: Intracomm, mpi_tmp_path: Path) -> None:
    """Of any process: nobody else saves in the run's directory. Links are neither followed nor removed."""
    root = mpi_tmp_path / "node0" / "this"
    left = ".step_00000007.tmp-1@another.host.1-0123abcd"
    links = ["step_00000009-0123456789abcdef", ".step_00000008.tmp-1@another.host.1-0123abcd"]

    def plant() -> None:
        place = outside(mpi_tmp_path)
        (root / left).mkdir(mode=0o700, parents=True)
        root.chmod(0o700)
        (root / left / "rank_00000.h5").write_bytes(TEXT)
        (root / "notes").write_bytes(TEXT)
        for name in links:
            (root / name).symlink_to(place)

    alone(world, plant)
    with tier(world, mpi_tmp_path) as made:
        assert made.checkpoints() == []
        assert save(made, 1, 2, 3)
        assert [c.step for c in made.checkpoints()] == [3, 2]
        world.Barrier()
        made.clear()
    world.Barrier()
    if world.rank == 0:
        assert sorted(path.name for path in root.iterdir()) == sorted([*links, "notes"])
        assert_as_it_was(mpi_tmp_path / "outside")


@mpi
@pytest.mark.parametrize("how", ["link", "open to all"])
def test_a_directory_that_is_not_this_users_alone_is_not_used(
    world: Intracomm, mpi_tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    def plant() -> None:
        place = outside(mpi_tmp_path)
        (mpi_tmp_path / "node0").mkdir()
        if how == "link":
            (mpi_tmp_path / "node0" / "this").symlink_to(place)
        else:
            (mpi_tmp_path / "node0" / "this").mkdir()
            (mpi_tmp_path / "node0" / "this").chmod(0o777)

    alone(world, plant)
    with tier(world, mpi_tmp_path) as made:
        assert not save(made, 1)
        made.clear()
    world.Barrier()
    assert_as_it_was(mpi_tmp_path / "outside")
    if world.rank == 0:
        assert "node0/this: not a directory of this user alone; there will be no more" in caplog.text


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("planted", ["rank_00000.h5", ".rank_00000.h5.partial", "manifest.json", "a pipe"])
def test_links_in_a_step_are_replaced_and_not_followed(world: Intracomm, mpi_tmp_path: Path, planted: str) -> None:
    with tier(world, mpi_tmp_path) as made:
        save(made, 1)

    def plant() -> None:
        place = outside(mpi_tmp_path)
        (step,) = (mpi_tmp_path / "node0" / "this").iterdir()
        (step / "rank_00000.h5").unlink()
        if planted == "a pipe":
            os.mkfifo(step / "rank_00000.h5")
        else:
            (step / planted).unlink(missing_ok=True)
            (step / planted).symlink_to(place / planted.removeprefix(".").removesuffix(".partial"))

    alone(world, plant)
    with tier(world, mpi_tmp_path) as made:
        slabs = targets(made.mesh)
        made.checkpoints()[0].load(slabs)
        assert_filled(slabs, 1)
        world.Barrier()
        for path in made.root.rglob("*"):
            assert path.is_dir() or (path.is_file() and not path.is_symlink()), path
    world.Barrier()
    assert_as_it_was(mpi_tmp_path / "outside")


def test_a_step_is_what_its_name_says(tmp_path: Path) -> None:
    """A directory whose manifest is not that of its name, or none, is no step; nor is one that others could change."""
    saved = LocalTier(str(tmp_path), "saved", Mesh())
    save(saved, 1)
    ((name, (_, whole, files)),) = local_steps.look(saved.root).items()
    assert files == ["rank_00000.h5"]
    (saved.root / name).rename(saved.root / f"{name[:14]}0123456789abcdef")
    assert local_steps.look(saved.root) == {}
    root = tmp_path / "run"
    local_steps.own(root)
    for name, text in (("step_00000001-0123456789abcdef", whole), ("step_00000002-0123456789abcdef", None)):
        (root / name).mkdir()
        if text:
            (root / name / "manifest.json").write_bytes(text)
    assert local_steps.look(root) == {} and local_steps.look(tmp_path / "none") == {}
    local_steps.prune(root, [root / "step_00000001-0123456789abcdef"])
    assert [path.name for path in root.iterdir()] == ["step_00000001-0123456789abcdef"]
    root.chmod(0o770)
    local_steps.prune(root, [])
    assert len(list(root.iterdir())) == 1
