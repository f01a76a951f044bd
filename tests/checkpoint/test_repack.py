"""Repacking: the same checkpoint in another storage, or none."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest

from hpcmp.checkpoint import Slab, open_checkpoint, repack, save, slab
from hpcmp.comm.mesh import Mesh
from hpcmp.errors import CheckpointError, InputError
from tests.checkpoint.cases import STATE, assert_filled, owned, targets, version_at, write


@pytest.mark.parametrize(("one", "other"), list(itertools.product(["files", "node", "shared", "mpio"], repeat=2)))
def test_from_any_storage_to_any_other(tmp_path, one, other):
    old = open_checkpoint(write(tmp_path / "a", 12, 3, storage=one))
    path = repack(old, tmp_path / "b", other)
    assert path == tmp_path / "b" / "step_00000012"
    new = open_checkpoint(tmp_path / "b")
    assert (new.step, new.state, new.tensors, new.manifest.storage) == (12, STATE, old.tensors, other)
    assert new.verify() == [] and version_at(path) == 3 and version_at(tmp_path / "a") == 3


def test_in_its_own_place(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    repack(open_checkpoint(tmp_path), tmp_path, "shared")
    assert open_checkpoint(tmp_path).manifest.storage == "shared" and version_at(tmp_path) == 2
    assert version_at(tmp_path / "step_00000001") == 1


def test_an_older_step_does_not_become_the_newest(tmp_path):
    for step in (1, 2):
        write(tmp_path, step)
    with pytest.raises(InputError, match="newest checkpoint is of step 2; .*another folder"):
        repack(open_checkpoint(tmp_path / "step_00000001"), tmp_path, "shared")
    assert version_at(tmp_path) == 2


def test_a_damaged_one_is_not_made_good(tmp_path):
    path = write(tmp_path / "a", 1)
    data = path / "rank_00000.h5"
    text = bytearray(data.read_bytes())
    text[open_checkpoint(path).manifest.files[data.name].extents[-1][0]] ^= 1
    data.write_bytes(text)
    with pytest.raises(CheckpointError, match=r"rank_00000\.h5: .*damaged"):
        repack(open_checkpoint(path), tmp_path / "b", "shared")
    assert not (tmp_path / "b").exists()


def test_where_there_can_be_no_folder(tmp_path):
    write(tmp_path / "a", 1)
    (tmp_path / "b").touch()
    with pytest.raises(InputError, match="b: is no folder"):
        repack(open_checkpoint(tmp_path / "a"), tmp_path / "b" / "c", "shared")


def test_no_tensor_is_ever_whole_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(slab, "BLOCK", 1 << 16)
    data = np.ones((1000, 2000), "float32")
    whole = Slab("x", data.shape, (slice(0, 1000), slice(0, 2000)), data)
    old = open_checkpoint(save(tmp_path / "a", 1, [whole], {}, Mesh()))
    tracemalloc.start()
    repack(old, tmp_path / "b", "shared")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20  # of 8 MB


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("files", "node"),
        ("node", "shared"),
        ("shared", "files"),
        pytest.param("shared", "mpio", marks=pytest.mark.mpio),
        pytest.param("mpio", "files", marks=pytest.mark.mpio),
    ],
)
def test_on_many_ranks(world, mpi_tmp_path, one, other):
    with Mesh(world, tp=world.size) as mesh:
        save(mpi_tmp_path / "a", 1, owned(mesh, 4), STATE, mesh, storage=one)
        repack(open_checkpoint(mpi_tmp_path / "a", mesh), mpi_tmp_path / "b", other)
        new = open_checkpoint(mpi_tmp_path / "b", mesh)
        assert new.manifest.storage == other and new.state == STATE
        assert all(len(tensor.pieces) == 1 for tensor in new.manifest.tensors.values())
        slabs = targets(mesh)
        new.load(slabs)
        assert_filled(slabs, 4)
        world.barrier()
