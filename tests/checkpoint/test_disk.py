"""Disks that fail and directories that nobody may write in: nothing is committed, what was saved before stays."""

from __future__ import annotations

import os

import pytest

from hpcmp.checkpoint import CheckpointSaveError, Lock, Saver, open_checkpoint
from hpcmp.comm.mesh import Mesh
from tests.checkpoint.cases import version_at, write
from tests.checkpoint.test_saver import behind
from tests.faults import CALLS, fail, in_child, permissions

pytestmark = pytest.mark.timeout(300)


@pytest.mark.skipif(not CALLS, reason="the numbers of system calls are known for x86_64 and aarch64")
@pytest.mark.parametrize("storage", ["files", "shared"])
@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_disk_that_fails(tmp_path, call, storage, at_once):
    """The kernel gives EIO for every write, or every fsync, of the process, from whatever library it comes."""
    write(tmp_path, 1, storage=storage)
    before = sorted(tmp_path.rglob("*"))

    def work():
        saver = Saver(tmp_path, Mesh(), storage=storage)
        fail(call)
        try:
            if at_once:
                write(tmp_path, 2, storage=storage)
            else:
                behind(saver, 2, 2)
                saver.wait()
        except CheckpointSaveError as error:
            return str(error)
        return "saved"

    told = in_child(work)
    assert told.startswith(f"{tmp_path}: step 2 is not saved: {tmp_path}/") and told.endswith(": Input/output error")
    assert sorted(tmp_path.rglob("*")) == before and version_at(tmp_path) == 1
    write(tmp_path, 2, storage=storage)
    assert version_at(tmp_path) == 2


def test_a_directory_that_becomes_read_only(tmp_path):
    """It can be read as ever; the save says why it fails; there is no lock to be had."""
    root = tmp_path / "run"
    write(root, 1)
    os.chmod(root, 0o500)
    try:
        with permissions():
            for save in (lambda: write(root, 2), lambda: behind(Saver(root, Mesh()), 2, 2)):
                with pytest.raises(CheckpointSaveError, match=rf"step 2 is not saved: {root}/.*: Permission denied$"):
                    save()
            with pytest.raises(PermissionError):
                Lock(root).take()
            assert version_at(root) == 1 and open_checkpoint(root).verify() == []
        assert sorted(path.name for path in root.iterdir()) == ["latest", "step_00000001"]
    finally:
        os.chmod(root, 0o700)
    write(root, 2)
    assert version_at(root) == 2


def test_a_checkpoint_that_nobody_may_read(tmp_path):
    path = write(tmp_path, 1)
    write(tmp_path, 2)
    os.chmod(tmp_path / "step_00000002" / "rank_00000.h5", 0)
    with permissions():
        assert open_checkpoint(path).verify() == []
        with pytest.raises(Exception, match="Permission denied") as caught:
            version_at(tmp_path / "step_00000002")
        assert f"{tmp_path}/step_00000002/rank_00000.h5: " in str(caught.value)
