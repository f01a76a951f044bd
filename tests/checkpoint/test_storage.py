"""The storages: where bytes go, that each is written once, that others find them, and that failures are told."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import stat
import typing
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcmp.checkpoint import CheckpointSaveError, Slab, Storage, manifest, open_checkpoint, reader, save, slab
from hpcmp.checkpoint.plan import plans
from hpcmp.checkpoint.slab import Region
from hpcmp.checkpoint.storage import KINDS, VERIFY
from hpcmp.comm.mesh import Mesh
from hpcmp.errors import CheckpointError, InputError
from hpcmp.training import config
from tests.checkpoint.cases import (
    MPIO,
    STATE,
    TENSORS,
    TOGETHER,
    assert_filled,
    owned,
    shapes,
    targets,
    value,
    version_at,
    write,
)

pytestmark = pytest.mark.timeout(300)

ALONE = {"files": "rank_00000.h5", "node": "node_00000.h5", "shared": "tensors.h5", "mpio": "tensors.h5"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "tape"}, "unknown storage 'tape'"),
        ({"verify": "perhaps"}, "not 'perhaps'"),
        ({"alignment": -1}, "alignment"),
        ({"hints": "cb_nodes"}, "cb_nodes=8"),
        ({"hints": "=3"}, "cb_nodes=8"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(InputError, match=words):
        Storage(**options)


def test_options():
    assert Storage.of("auto") == Storage("files") == Storage.of(Storage())
    assert Storage(hints=" striping_unit=4194304  cb_nodes=8").info() == {"striping_unit": "4194304", "cb_nodes": "8"}


def test_the_configuration_offers_them_all():
    kinds = typing.get_type_hints(config.Checkpoint)
    assert typing.get_args(kinds["storage"]) == tuple(KINDS) and typing.get_args(kinds["verify"]) == VERIFY


@pytest.mark.parametrize("storage", ALONE)
def test_other_programs_find_every_tensor(tmp_path, storage):
    path = write(tmp_path, 1, storage=storage)
    assert {file.name for file in path.iterdir()} == {"manifest.json", "tensors.h5", ALONE[storage]}
    path = path.rename(tmp_path / "elsewhere")  # the names in it are relative
    with h5py.File(path / "tensors.h5") as file:
        for name, (shape, dtype) in TENSORS.items():
            if name != "empty":
                np.testing.assert_array_equal(file[name][...], value(name, 1))
                assert file[name].shape == shape and file[name].dtype == dtype


@pytest.mark.parametrize("storage", ["files", "shared"])
def test_alignment(tmp_path, storage):
    for alignment in (512, 4096, 0):
        path = write(tmp_path, 1, storage=Storage(storage, alignment=alignment))
        with h5py.File(path / ALONE[storage]) as file:
            places = {name: file[name].id.get_offset() for name in ("model/wide", "model/scale", "tokenizer")}
        block = alignment or os.stat(tmp_path).st_blksize
        assert places["model/wide"] % block == 0  # 24 KB
        assert any(places[name] % block for name in ("model/scale", "tokenizer"))  # small ones lie as they come
        assert version_at(path) == 1


def test_any_part_of_any_tensor_lands_where_it_belongs(tmp_path, monkeypatch):
    """One tensor, cut at random along every axis, written in small blocks into one dataset."""
    draw = np.random.default_rng(7)
    for step in range(30):
        shape = tuple(draw.integers(1, 7, size=draw.integers(1, 5)).tolist())
        data = draw.normal(size=shape)
        cuts = [[0, *sorted(draw.choice(n + 1, size=2).tolist()), n] for n in shape]
        slabs = []
        for corner in np.ndindex(*(3 for _ in shape)):
            index = tuple(slice(c[i], c[i + 1]) for c, i in zip(cuts, corner, strict=True))
            slabs.append(Slab("x", shape, index, data[index]))
        monkeypatch.setattr(slab, "BLOCK", int(draw.integers(8, 200)))
        path = save(tmp_path, step, slabs, {}, Mesh(), storage="shared")
        with h5py.File(path / "tensors.h5") as file:
            np.testing.assert_array_equal(file["x"][...], data)
        np.testing.assert_array_equal(open_checkpoint(path).read("x"), data)


def test_what_mpi_io_collects():
    """Tensors of which a part is no single run of bytes, in as many rounds as the rank with most blocks has blocks."""
    big = (8, 3 << 20), "float32"  # 12 MiB a row
    told = [
        [("rows", big, Region((0, 0), (3, 3 << 20))), ("columns", big, Region((0, 0), (8, 1 << 20)))],
        [("rows", big, Region((3, 0), (5, 3 << 20))), ("columns", big, Region((0, 1 << 20), (8, 2 << 20)))],
    ]
    kinds = {"columns": big, "rows": big}
    for plan in plans("mpio", kinds, told, (0, 0)):
        assert plan.rounds == {"columns": 4}  # two rows of 8 MiB in each block of 16
    assert all(plan.rounds == {} for plan in plans("shared", kinds, told, (0, 0)))


@pytest.mark.parametrize("verify", ["cache", "disk", "no"])
def test_a_write_that_is_lost_is_found_if_it_is_looked_for(tmp_path, monkeypatch, verify):
    real, needle = os.pwrite, value("model/blocks/1/qkv", 2).tobytes()
    dropped = []

    def lossy(descriptor, data, offset):
        if bytes(data) == needle:
            dropped.append(offset)
            return len(data)
        return real(descriptor, data, offset)

    write(tmp_path, 1)
    forgotten = []
    advise = os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: forgotten.append(args[1:]) or advise(*args))
    monkeypatch.setattr(os, "pwrite", lossy)
    if verify == "no":
        path = write(tmp_path, 2, storage=Storage(verify=verify))
        assert "model/blocks/1/qkv: damaged" in open_checkpoint(path).verify()[0]
    else:
        with pytest.raises(CheckpointSaveError, match="model/blocks/1/qkv does not read back as it was written"):
            write(tmp_path, 2, storage=Storage(verify=verify))
        assert version_at(tmp_path) == 1
    assert len(dropped) == 1 and forgotten.count((0, 0, os.POSIX_FADV_DONTNEED)) == (verify == "disk")


@pytest.mark.parametrize("limit", [0, 500, 3000, 20_000])
@pytest.mark.parametrize("storage", ["node", "shared"])
def test_a_limit_on_file_sizes(tmp_path, storage, limit):
    write(tmp_path, 1, storage=storage)
    before = sorted(tmp_path.rglob("*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointSaveError, match=f"/{ALONE[storage]}: File too large$"):
            write(tmp_path, 2, storage=storage)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(tmp_path.rglob("*")) == before and version_at(tmp_path) == 1


@pytest.mark.parametrize("storage", ["files", "shared"])
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_the_system_s_errors_are_told(tmp_path, monkeypatch, storage, call):
    """A disk that is full when a block is written; one that fails when all is to be on it."""
    code = {"pwrite": errno.ENOSPC, "fsync": errno.EIO}[call]
    real = getattr(os, call)

    def failing(descriptor, *rest):
        place = os.readlink(f"/proc/self/fd/{descriptor}")
        if place.endswith(ALONE[storage]) and stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        return real(descriptor, *rest)

    write(tmp_path, 1)
    monkeypatch.setattr(os, call, failing)
    with pytest.raises(CheckpointSaveError, match=rf"/{ALONE[storage]}: {os.strerror(code)}$"):
        write(tmp_path, 2, storage=storage)
    monkeypatch.undo()
    assert sorted(file.name for file in tmp_path.glob("*step*")) == ["step_00000001"] and version_at(tmp_path) == 1


def test_a_hostile_overview_does_not_matter(tmp_path):
    """tensors.h5 of storage "files" points out of the checkpoint, under a digest that fits: nobody follows it."""
    path = write(tmp_path, 1)
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["x"] = np.ones((7, 11), "f4")
    (path / "tensors.h5").unlink()
    with h5py.File(path / "tensors.h5", "w") as file:
        for name in TENSORS:
            file[name] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "x")
    with pytest.raises(CheckpointError, match=r"tensors\.h5: .* bytes long instead of"):
        open_checkpoint(path)
    honest, _ = manifest.read(path / "manifest.json")
    files = honest.files | {"tensors.h5": reader.measure(path / "tensors.h5", [])}
    (path / "manifest.json").write_bytes(dataclasses.replace(honest, files=files).render())
    (tmp_path / "secret.h5").unlink()
    os.mkfifo(tmp_path / "secret.h5")  # who opened it now would wait for ever
    checkpoint = open_checkpoint(path)
    slabs = targets(Mesh())
    checkpoint.load(slabs)
    assert_filled(slabs, 1)
    assert checkpoint.verify() == []


def test_a_flip_in_the_overview_is_found_by_verify(tmp_path):
    path = write(tmp_path, 1)
    text = bytearray((path / "tensors.h5").read_bytes())
    text[len(text) // 2] ^= 4
    (path / "tensors.h5").write_bytes(text)
    (problem,) = open_checkpoint(path).verify()
    assert "tensors.h5: damaged" in problem
    assert version_at(path) == 1  # the numbers are sound, and load needs no overview


@pytest.mark.mpi
@pytest.mark.parametrize("storage", TOGETHER)
def test_each_byte_is_written_once_by_its_owner(world, mpi_tmp_path, storage, monkeypatch):
    real, mine = os.pwrite, []

    def counted(descriptor, data, offset):
        mine.append(len(data))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", counted)
    for step, layout in enumerate(shapes(world.size)[:3]):
        mine.clear()
        with Mesh(world, **layout) as mesh:
            slabs = list(owned(mesh, step))
            save(mpi_tmp_path, step, slabs, STATE, mesh, storage=storage)
        if storage != "mpio":
            assert sum(mine) == sum(s.data.nbytes for s in slabs)
        else:
            assert mine == []  # all went through MPI-IO


@pytest.mark.mpi
@pytest.mark.parametrize("last", ["shared", MPIO])
def test_a_step_that_is_saved_again_in_another_storage(world, mpi_tmp_path, last):
    with Mesh(world, tp=world.size) as mesh:
        for version, storage in enumerate(["files", "node", last, "files"]):
            path = save(mpi_tmp_path, 5, owned(mesh, version), STATE, mesh, storage=storage)
            found = open_checkpoint(mpi_tmp_path, mesh)
            assert found.manifest.storage == storage
            slabs = targets(mesh)
            found.load(slabs)
            assert_filled(slabs, version)
            world.barrier()
            assert {file.name for file in path.iterdir()} == {"manifest.json", *found.manifest.files}
            world.barrier()


@pytest.mark.mpi(min_size=2)
def test_a_file_for_each_node(world, mpi_tmp_path, monkeypatch):
    monkeypatch.setenv("HPCMP_NODES", "0,0,1")
    nodes = {rank % 3 // 2 for rank in range(world.size)}
    with Mesh(world, tp=world.size) as mesh:
        path = save(mpi_tmp_path, 1, owned(mesh, 1), STATE, mesh, storage="node")
        found = open_checkpoint(mpi_tmp_path, mesh)
        assert set(found.manifest.files) == {"tensors.h5", *(f"node_{node:05d}.h5" for node in nodes)}
        slabs = targets(mesh)
        found.load(slabs)
        assert_filled(slabs, 1)
        with h5py.File(path / "tensors.h5") as file:
            np.testing.assert_array_equal(file["model/wide"][1:, 1000:3000], value("model/wide", 1)[1:, 1000:3000])
        world.barrier()


@pytest.mark.mpi
@pytest.mark.parametrize("storage", TOGETHER)
def test_a_rank_that_cannot_have_its_numbers_keeps_nobody_waiting(world, mpi_tmp_path, storage, monkeypatch):
    """A GPU that fails on the last rank, in the middle of a tensor that all write."""
    real = slab.BLOCK
    last = world.rank == world.size - 1

    class Lost:
        shape, dtype = (40, 7), np.dtype("f4")

        def __getitem__(self, index):
            if index[0].start >= 20:
                raise RuntimeError("the device is lost")
            return np.zeros([s.stop - s.start for s in index], "f4")

    monkeypatch.setattr(slab, "BLOCK", 128)
    index = slice(0, 40), slice(7 * world.rank, 7 * world.rank + 7)
    data = Lost() if last else np.ones((40, 7), "f4")
    with Mesh(world, dp=world.size) as mesh:
        with pytest.raises(CheckpointSaveError) as caught:
            save(mpi_tmp_path, 1, [Slab("x", (40, 7 * world.size), index, data)], {}, mesh, storage=storage)
        assert "the device is lost" in str(caught.value)
        assert len(set(world.allgather(str(caught.value)))) == 1
        world.barrier()
        assert not list(Path(mpi_tmp_path).glob("*step*"))
        monkeypatch.setattr(slab, "BLOCK", real)
        save(mpi_tmp_path, 1, owned(mesh, 1), STATE, mesh, storage=storage)
        assert open_checkpoint(mpi_tmp_path, mesh).verify() == []
        world.barrier()
