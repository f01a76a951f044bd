"""Storage "mpio" on several ranks: what MPI-IO is told, who writes what, and that all ranks fail as one.

The other files run their cases of every storage with it too (``cases.TOGETHER``).
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from contextlib import contextmanager

import h5py
import numpy as np
import pytest

from hpcmp.checkpoint import CheckpointSaveError, Saver, Storage, mpio, open_checkpoint, repack, save, slab
from hpcmp.comm import recorder
from hpcmp.comm.mesh import Mesh
from hpcmp.errors import CheckpointError, InputError
from tests.checkpoint.cases import (
    STATE,
    TENSORS,
    assert_filled,
    assert_untouched,
    owned,
    same_everywhere,
    shapes,
    targets,
    value,
    version_at,
)

pytestmark = [pytest.mark.mpi, pytest.mark.mpio, pytest.mark.timeout(300)]


@contextmanager
def limited(size):
    """No file may grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_this_h5py_has_mpi(world):
    """Else everything below would be another storage's, or be skipped and not told."""
    assert h5py.get_config().mpi and "mpio" in h5py.registered_drivers()


def test_what_mpi_io_is_told_and_where_datasets_begin(world, mpi_tmp_path, monkeypatch):
    real, told = h5py.File, []

    def opened(*args, **options):
        file = real(*args, **options)
        if options.get("driver") == "mpio":
            comm, info = file.id.get_access_plist().get_fapl_mpio()
            given = {key: options["info"].Get(key) for key in ("striping_unit", "cb_nodes")}
            told.append((comm.size, given, info.Get("cb_nodes")))
        return file

    monkeypatch.setattr(h5py, "File", opened)
    storage = Storage("mpio", alignment=8192, hints="striping_unit=8192 cb_nodes=1")
    with Mesh(world, tp=world.size) as mesh:
        path = save(mpi_tmp_path, 1, owned(mesh, 1), STATE, mesh, storage=storage)
        assert told == [(world.size, {"striping_unit": "8192", "cb_nodes": "1"}, "1")]
        with real(path / "tensors.h5") as file:
            places = {name: file[name].id.get_offset() for name in TENSORS if name != "empty"}
        assert places["model/wide"] % 8192 == 0  # 24 KB
        assert any(places[name] % 8192 for name in ("model/scale", "tokenizer"))  # small ones lie as they come
        assert open_checkpoint(mpi_tmp_path, mesh).verify() == []
        world.barrier()


def test_each_number_is_written_once_by_its_owner(world, mpi_tmp_path, monkeypatch):
    """On every layout of so many ranks, in whole parts and in blocks of 200 bytes."""
    real, counts, collective = mpio._put, {}, []

    def put(dataset, block, transfer):
        collective.append(transfer.get_dxpl_mpio() == h5py.h5fd.MPIO_COLLECTIVE)
        if block is not None:
            name, (start, host) = h5py.h5i.get_name(dataset).decode()[1:], block
            count = counts.setdefault(name, np.zeros(TENSORS[name][0], int))
            count[tuple(slice(a, a + n) for a, n in zip(start, host.shape, strict=True))] += 1
        real(dataset, block, transfer)

    monkeypatch.setattr(mpio, "_put", put)
    for step, layout in enumerate(shapes(world.size)):
        monkeypatch.setattr(slab, "BLOCK", 200 if step % 2 else 1 << 24)
        counts.clear()
        with Mesh(world, **layout) as mesh:
            save(mpi_tmp_path, step, owned(mesh, step), STATE, mesh, storage="mpio")
            mine = {name: np.zeros(shape, int) for name, (shape, _) in TENSORS.items()}
            for part in owned(mesh, step):
                mine[part.name][part.index] = 1
        for name, owns in mine.items():
            np.testing.assert_array_equal(counts.get(name, 0 * owns), owns, err_msg=name)
            assert (world.allreduce(owns) == 1).all(), name
    assert set().union(*world.allgather(collective)) == ({False, True} if world.size > 1 else {False})


def test_what_ranks_wait_in_is_recorded(world, mpi_tmp_path, monkeypatch):
    """Every call of HDF5 that all ranks make together, under the same number on all."""
    monkeypatch.setattr(recorder, "RECORDER", fresh := recorder.Recorder())
    with Mesh(world, tp=world.size) as mesh:
        save(mpi_tmp_path, 1, owned(mesh, 1), STATE, mesh, storage="mpio")
        found = [r for r in fresh.snapshot()["records"] if r["operation"].startswith("MPI-IO")]
    told = [(r["sequence"], r["operation"], r["state"]) for r in found]
    assert [name for _, name, _ in told] == ["MPI-IO open", *["MPI-IO write"] * (len(told) - 2), "MPI-IO close"]
    assert world.allgather(told) == [told] * world.size and {state for *_, state in told} == {"finished"}
    assert (len(told) > 2) == (world.size > 1)  # one rank alone writes when it likes
    assert all(r["site"].startswith("hpcmp/checkpoint/mpio.py:") for r in found)


def test_the_same_bytes_as_shared(world, mpi_tmp_path):
    for step, layout in enumerate(shapes(world.size)):
        with Mesh(world, **layout) as mesh:
            paths = [
                save(mpi_tmp_path / storage, step, owned(mesh, step), STATE, mesh, storage=storage)
                for storage in ("shared", "mpio")
            ]
            one, other = (np.fromfile(path / "tensors.h5", np.uint8) for path in paths)
            np.testing.assert_array_equal(one, other)
            world.barrier()


def test_to_files_and_back_on_other_layouts(world, mpi_tmp_path):
    """What each layout saves in one storage, the next loads and saves in the other."""
    layouts = shapes(world.size)
    with Mesh(world, **layouts[-1]) as mesh:
        save(mpi_tmp_path, 1, owned(mesh, 7), STATE, mesh, storage="mpio")
    for step, layout in enumerate(layouts * (2 if world.size == 1 else 1), 2):
        storage = ("mpio", "files")[step % 2 == 0]
        with Mesh(world, **layout) as mesh:
            found = open_checkpoint(mpi_tmp_path, mesh)
            assert found.step == step - 1 and found.manifest.storage != storage
            slabs = targets(mesh)
            found.load(slabs)
            assert_filled(slabs, 7)
            save(mpi_tmp_path, step, owned(mesh, 7), STATE, mesh, storage=storage)
            back = "mpio" if storage == "files" else "files"
            repack(open_checkpoint(mpi_tmp_path, mesh), mpi_tmp_path / f"b{step}", back)
            again = targets(mesh)
            open_checkpoint(mpi_tmp_path / f"b{step}", mesh).load(again)
            assert_filled(again, 7)
            world.barrier()


@pytest.mark.parametrize("limit", [0, 3000, 20_000])
def test_one_rank_has_no_room(world, mpi_tmp_path, limit):
    """Every rank in its turn: the same error on all, the checkpoint before as it was, and the next save succeeds."""
    with Mesh(world, tp=world.size) as mesh:
        save(mpi_tmp_path, 1, owned(mesh, 1), STATE, mesh, storage="mpio")
        for culprit in range(world.size):
            world.barrier()
            with limited(limit) if world.rank == culprit else limited(resource.RLIM_INFINITY):
                with pytest.raises(CheckpointSaveError, match=r"tensors\.h5: File too large$") as caught:
                    save(mpi_tmp_path, 2, owned(mesh, 2), STATE, mesh, storage="mpio")
            text = same_everywhere(world, str(caught.value))
            who = f"rank {culprit}: " if world.size > 1 else ""
            assert text.startswith(f"{mpi_tmp_path}: step 2 is not saved: {who}{mpi_tmp_path}/")
            assert sorted(p.name for p in mpi_tmp_path.iterdir()) == ["latest", "step_00000001"]
            world.barrier()
        assert world.rank or version_at(mpi_tmp_path) == 1
        save(mpi_tmp_path, 2, owned(mesh, 2), STATE, mesh, storage="mpio")
        assert world.rank or version_at(mpi_tmp_path) == 2
        world.barrier()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_the_disk_has_no_room(world, mpi_tmp_path, code, monkeypatch):
    """It is found before anything is written."""

    class Full:
        @staticmethod
        def fallocate(descriptor, mode, offset, size):
            assert size.value == os.fstat(descriptor).st_size > 24_000
            ctypes.set_errno(code)
            return -1

    with Mesh(world, tp=world.size) as mesh:
        save(mpi_tmp_path, 1, owned(mesh, 1), STATE, mesh, storage="mpio")
        with monkeypatch.context() as patch:
            patch.setattr(mpio, "LIBC", Full)
            patch.setattr(mpio, "_put", None)
            with pytest.raises(CheckpointSaveError) as caught:
                save(mpi_tmp_path, 2, owned(mesh, 2), STATE, mesh, storage="mpio")
        assert same_everywhere(world, str(caught.value)).endswith(f"tensors.h5: {os.strerror(code)}")
        world.barrier()
        assert sorted(p.name for p in mpi_tmp_path.iterdir()) == ["latest", "step_00000001"]
        world.barrier()
        save(mpi_tmp_path, 2, owned(mesh, 2), STATE, mesh, storage="mpio")
        world.barrier()


def test_a_flipped_byte_is_found_by_all_ranks(world, mpi_tmp_path):
    name = "model/wide"
    with Mesh(world, tp=world.size) as mesh:
        path = save(mpi_tmp_path, 1, owned(mesh, 1), STATE, mesh, storage="mpio") / "tensors.h5"
        if world.rank == 0:
            with h5py.File(path) as file:
                place = file[name].id.get_offset() + value(name).nbytes - 3
            with path.open("r+b") as stream:
                stream.seek(place)
                (byte,) = stream.read(1)
                stream.seek(place)
                stream.write(bytes([byte ^ 16]))
        world.barrier()
        slabs = targets(mesh)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(mpi_tmp_path, mesh).load(slabs)
        assert same_everywhere(world, str(caught.value)).startswith(f"{path}: {name}: damaged")
        assert_untouched(slabs)


def test_saving_behind_the_training_is_refused(world, mpi_tmp_path):
    with Mesh(world, tp=world.size) as mesh:
        saver = Saver(mpi_tmp_path, mesh, storage="mpio")
        with pytest.raises(InputError) as caught:
            saver.begin(1, owned(mesh, 1), STATE)
        words = "storage mpio cannot be written in the background: its ranks write together"
        assert same_everywhere(world, str(caught.value)) == words
        assert saver.running is None and not list(mpi_tmp_path.iterdir())
        assert saver.save(1, owned(mesh, 1), STATE).step == 1
        world.barrier()
