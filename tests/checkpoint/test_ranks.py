"""Saving and loading on several ranks: any layout reads what any other wrote, and all ranks fail as one."""

from __future__ import annotations

import itertools
import os
import shutil
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcmp.checkpoint import CheckpointSaveError, Slab, open_checkpoint, save
from hpcmp.comm.mesh import Mesh
from hpcmp.errors import CheckpointError, InputError
from tests.checkpoint.cases import (
    STATE,
    TOGETHER,
    assert_filled,
    assert_untouched,
    owned,
    same_everywhere,
    shapes,
    targets,
    value,
    version_at,
)

pytestmark = pytest.mark.timeout(300)


@pytest.mark.mpi
@pytest.mark.parametrize("storage", TOGETHER)
def test_each_layout_reads_another(world, mpi_tmp_path, storage):
    layouts = shapes(world.size)[:: 1 if world.size < 8 else 3]
    for step, (one, other) in enumerate(zip(layouts, layouts[1:] + layouts[:1], strict=True)):
        with Mesh(world, **one) as mesh:
            path = save(mpi_tmp_path, step, owned(mesh, step), STATE, mesh, storage=storage)
            assert path == mpi_tmp_path / f"step_{step:08d}"
        with Mesh(world, **other) as mesh:
            found = open_checkpoint(mpi_tmp_path, mesh)
            assert (found.step, found.state) == (step, STATE)
            slabs = targets(mesh)
            found.load(slabs)
            assert_filled(slabs, step)
    world.barrier()
    if world.rank == 0:
        assert version_at(mpi_tmp_path) == step and open_checkpoint(mpi_tmp_path).verify() == []
        assert len(list(mpi_tmp_path.iterdir())) == 1 + min(2, step + 1)
    world.barrier()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("storage", TOGETHER)
def test_another_number_of_ranks(world, mpi_tmp_path, storage):
    for writers, readers in (
        (1, world.size),
        (world.size - 1, world.size),
        (world.size, 1),
        (world.size, world.size - 1),
    ):
        some = world.Split(world.rank < writers)
        if world.rank < writers:
            with Mesh(some, tp=writers) as mesh:
                save(mpi_tmp_path, 1, owned(mesh, writers), STATE, mesh, storage=storage)
        world.barrier()
        others = world.Split(world.rank < readers)
        if world.rank < readers:
            with Mesh(others, dp=readers) as mesh:
                slabs = targets(mesh)
                open_checkpoint(mpi_tmp_path, mesh).load(slabs)
                assert_filled(slabs, writers)
        world.barrier()
        some.Free()
        others.Free()


def line(start, stop, total=12):
    return Slab("x", (total,), (slice(start, stop),), np.zeros(max(0, stop - start), "f4"))


@pytest.mark.mpi
def test_slabs_that_do_not_tile_are_refused_by_all(world, mpi_tmp_path):
    rank, size = world.rank, world.size
    last = rank == size - 1
    misfit = Slab("x", (size,), (slice(0, size),), np.zeros(size + 1))
    who = f"rank {size - 1}: " if size > 1 else ""
    cases = [
        (f"x: only {size} of {size + 1} elements are there", line(rank, rank + 1, size + 1)),
        (f"{who}x: the data have shape ({size + 1},), the index ({size},)", misfit if last else line(0, 0)),
    ]
    if size > 1:
        cases += [
            (
                f"x: float32 ({size},) on rank {size - 1}, float32 ({size + 2},) before it",
                line(rank, rank + 1, size + 2 * (not last)),
            ),
            ("x: [0:1] and [0:1] overlap", line(0, 1, 1)),
        ]
    with Mesh(world, dp=size) as mesh:
        save(mpi_tmp_path, 1, owned(mesh, 1), STATE, mesh)
        for words, slab in cases:
            with pytest.raises(CheckpointSaveError) as caught:
                save(mpi_tmp_path, 2, [slab], STATE, mesh)
            assert same_everywhere(world, str(caught.value)).startswith(f"{mpi_tmp_path}: step 2 is not saved: ")
            assert words in str(caught.value)
        world.barrier()
        assert sorted(p.name for p in mpi_tmp_path.iterdir()) == ["latest", "step_00000001"]
        assert rank or version_at(mpi_tmp_path) == 1
        world.barrier()


@pytest.mark.mpi
@pytest.mark.parametrize("storage", TOGETHER)
def test_ranks_without_slabs(world, mpi_tmp_path, storage):
    writer = world.size // 2
    with Mesh(world, pp=world.size) as mesh:
        slabs = [line(0, 12)] if mesh.rank == writer else [line(5, 5)]
        save(mpi_tmp_path, 1, slabs, {}, mesh, storage=storage)
        found = open_checkpoint(mpi_tmp_path, mesh)
        names = {"files": f"rank_{writer:05d}.h5", "node": "node_00000.h5"}
        assert set(found.manifest.files) == {"tensors.h5", names.get(storage, "tensors.h5")}
        found.load([])
        np.testing.assert_array_equal(found.read("x"), np.zeros(12))


@pytest.mark.mpi
@pytest.mark.parametrize("storage", TOGETHER)
def test_three_lines_of_plain_h5py_read_any_tensor(world, mpi_tmp_path, storage, monkeypatch):
    root = Path(__file__).parents[2]
    lines = '    import h5py\n    with h5py.File("'
    with Mesh(world, tp=world.size) as mesh:
        save(mpi_tmp_path / "runs/gpt/checkpoints", 1000, owned(mesh, 6), STATE, mesh, storage=storage)
        monkeypatch.chdir(mpi_tmp_path)
        for text in ((root / "README.md").read_text(), (root / "docs" / "checkpoints.md").read_text()):
            program = "".join(text[text.index(lines) :].splitlines(keepends=True)[:3])
            for name in ("model/scale", "model/wide", "model/blocks/1/qkv"):
                names: dict[str, object] = {}
                exec(textwrap.dedent(program).replace("model/blocks/0/mlp/up/weight", name), names)
                np.testing.assert_array_equal(names["weight"], value(name, 6))
        world.barrier()


@pytest.mark.mpi
def test_damage_that_one_rank_sees_changes_no_array_on_any(world, mpi_tmp_path):
    name = "model/wide"
    with Mesh(world, tp=world.size) as mesh:
        path = save(mpi_tmp_path, 1, owned(mesh, 1), STATE, mesh)
        found = open_checkpoint(mpi_tmp_path, mesh)
        culprit = path / f"rank_{world.size - 1:05d}.h5"
        if mesh.rank == 0:
            with h5py.File(culprit) as file:
                place = file[name].id.get_offset()
            with open(culprit, "r+b") as stream:
                stream.seek(place + 5)
                stream.write(b"\x55")
        world.barrier()
        slabs = targets(mesh)
        with pytest.raises(CheckpointError) as caught:
            found.load(slabs)
        assert same_everywhere(world, str(caught.value)).startswith(f"{culprit}: {name}: damaged")
        assert_untouched(slabs)


@pytest.mark.mpi(size=3)
@pytest.mark.parametrize("how", ["swapped", "of two steps"])
def test_files_of_ranks_that_are_mixed_are_refused_by_all(world, mpi_tmp_path, how):
    """Whose files are alike in size."""
    paths = []
    with Mesh(world, dp=world.size) as mesh:
        for step in (1, 2):
            data = np.full((1, 50), 10 * step + world.rank, "f4")
            slab = Slab("x", (world.size, 50), (slice(world.rank, world.rank + 1), slice(0, 50)), data)
            paths.append(save(mpi_tmp_path, step, [slab], {}, mesh))
        a = paths[1] / "rank_00000.h5"
        b = paths[1] / "rank_00001.h5" if how == "swapped" else paths[0] / "rank_00000.h5"
        if mesh.rank == 0:
            assert a.stat().st_size == b.stat().st_size
            a.rename(mpi_tmp_path / "aside")
            b.rename(a)
            (mpi_tmp_path / "aside").rename(b)
        world.barrier()
        found = np.full((world.size, 50), 77, "f4")
        with pytest.raises(CheckpointError) as caught:
            whole = slice(0, world.size), slice(0, 50)
            open_checkpoint(paths[1], mesh).load([Slab("x", found.shape, whole, found)])
        assert same_everywhere(world, str(caught.value)).startswith(f"{a}: ")
        assert (found == 77).all()
        world.barrier()


@pytest.mark.mpi
def test_a_slab_that_does_not_fit_on_one_rank_changes_no_array_on_any(world, mpi_tmp_path):
    with Mesh(world, tp=world.size) as mesh:
        save(mpi_tmp_path, 1, owned(mesh, 1), STATE, mesh)
        slabs = targets(mesh)
        wrong = [line(0, 12)] if mesh.rank == world.size - 1 else []
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(mpi_tmp_path, mesh).load([*slabs, *wrong])
        assert same_everywhere(world, str(caught.value)).endswith("there is no tensor x")
        assert_untouched(slabs)


@pytest.mark.mpi
def test_opening_fails_and_falls_back_on_all_ranks_alike(world, mpi_tmp_path):
    with Mesh(world, dp=world.size) as mesh:
        for step in (1, 2):
            save(mpi_tmp_path, step, owned(mesh, step), STATE, mesh)
        if mesh.rank == 0:
            os.truncate(mpi_tmp_path / "step_00000002" / "rank_00000.h5", 500)
        world.barrier()
        assert open_checkpoint(mpi_tmp_path, mesh).step == 1
        world.barrier()
        if mesh.rank == 0:
            shutil.rmtree(mpi_tmp_path / "step_00000001")
        world.barrier()
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(mpi_tmp_path, mesh)
        assert "rank_00000.h5: 500 bytes long" in same_everywhere(world, str(caught.value))


@pytest.mark.mpi
def test_a_directory_that_cannot_be_made(world, mpi_tmp_path):
    if world.rank == 0:
        (mpi_tmp_path / "file").touch()
    world.barrier()
    with Mesh(world, dp=world.size) as mesh:
        with pytest.raises(CheckpointSaveError) as caught:
            save(mpi_tmp_path / "file" / "run", 1, owned(mesh, 1), STATE, mesh)
        assert "Not a directory" in same_everywhere(world, str(caught.value))


@pytest.mark.mpi
@pytest.mark.skipif(h5py.get_config().mpi, reason="this h5py has MPI")
def test_a_shared_file_needs_an_h5py_with_mpi(world, mpi_tmp_path):
    with Mesh(world, dp=world.size) as mesh:
        with pytest.raises(InputError, match="h5py that was built with MPI"):
            save(mpi_tmp_path, 1, owned(mesh, 1), STATE, mesh, storage="mpio")


def test_every_shape_of_eight_ranks():
    assert len(shapes(8)) == 10 and all(np.prod(list(s.values())) == 8 for s in shapes(8))
    assert not any(a == b for a, b in itertools.combinations(shapes(8), 2))
