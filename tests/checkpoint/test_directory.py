"""The pointer, the choice of a checkpoint, and what may be swept away."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time

import pytest

from hpcmp.checkpoint import checkpoints, directory, open_checkpoint, save
from hpcmp.comm.mesh import Mesh
from hpcmp.errors import CheckpointError
from tests.checkpoint.cases import version_at, write
from tests.faults import permissions

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def run(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    return tmp_path


def test_a_flip_of_any_bit_of_the_pointer_still_opens_the_newest(run):
    good = (run / "latest").read_bytes()
    for at in range(len(good)):
        for bit in (0, 3, 6):
            flipped = bytearray(good)
            flipped[at] ^= 1 << bit
            (run / "latest").write_bytes(flipped)
            assert open_checkpoint(run).step == 2, flipped


@pytest.mark.parametrize("text", [b"", b"\n", b"step_00000001", b"../elsewhere abc", b"\xff" * 200, b"step_00000009 x"])
def test_a_damaged_pointer(run, text, caplog):
    (run / "latest").write_bytes(text)
    with caplog.at_level(logging.WARNING):
        assert open_checkpoint(run).step == 2
    assert "taking step_00000002 instead" in caplog.text and "latest" in caplog.text + "latest"


def test_no_pointer(run):
    (run / "latest").unlink()
    assert version_at(run) == 2


def test_the_pointer_decides(run):
    """Someone goes back: ``latest`` of another time names the older checkpoint, and that is taken."""
    from hpcmp.checkpoint import manifest

    directory.point(run, "step_00000001", manifest.read(run / "step_00000001" / "manifest.json")[1])
    assert open_checkpoint(run).step == 1


def damage(path, how):
    manifest, data = path / "manifest.json", path / "rank_00000.h5"
    if how == "no manifest":
        manifest.unlink()
    elif how == "bad manifest":
        manifest.write_bytes(manifest.read_bytes()[:-9])
    elif how == "no file":
        data.unlink()
    elif how == "short file":
        os.truncate(data, 1000)
    elif how == "long file":
        os.truncate(data, 10**6)
    elif how == "link":
        data.rename(path.parent / "elsewhere.h5")
        data.symlink_to(path.parent / "elsewhere.h5")
    elif how == "manifest link":
        manifest.rename(path.parent / "elsewhere.json")
        manifest.symlink_to(path.parent / "elsewhere.json")
    elif how == "fifo":
        data.unlink()
        os.mkfifo(data)
    elif how == "manifest fifo":
        manifest.unlink()
        os.mkfifo(manifest)


@pytest.mark.parametrize(
    "how",
    ["no manifest", "bad manifest", "no file", "short file", "long file", "link", "manifest link", "fifo"]
    + ["manifest fifo"],
)
def test_an_incomplete_checkpoint_is_refused_and_the_one_before_it_taken(run, how, caplog):
    newest = run / "step_00000002"
    damage(newest, how)
    culprit = newest / ("manifest.json" if "manifest" in how else "rank_00000.h5")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(newest)
    assert str(caught.value).startswith(f"{culprit}: ") and "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert version_at(run) == 1
    assert str(culprit) in caplog.text
    damage(run / "step_00000001", "short file")
    with pytest.raises(CheckpointError, match=str(culprit)):
        open_checkpoint(run)


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint in it"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="No such file"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"step_00000004/manifest\.json: No such file"):
        open_checkpoint(tmp_path / "step_00000004")
    assert checkpoints(tmp_path) == checkpoints(tmp_path / "nowhere") == []


def test_listing(run):
    assert checkpoints(run) == [run / "step_00000002", run / "step_00000001"]
    assert checkpoints(run / "step_00000001") == [run / "step_00000001"]
    damage(run / "step_00000002", "short file")
    assert checkpoints(str(run)) == [run / "step_00000001", run / "step_00000002"]


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def temporary(run, pid, host=None, age=0.0, kind="tmp", step=3):
    path = run / f".step_{step:08d}.{kind}-{pid}@{host or directory._host()}-0123abcd"
    path.mkdir()
    (path / "rank_00000.h5").write_bytes(b"half")
    for item in (path / "rank_00000.h5", path):
        os.utime(item, times=(time.time() - age,) * 2)
    return path


def test_only_what_the_dead_left_is_swept(run):
    gone = [
        temporary(run, dead_process()),
        temporary(run, 4711, "another-host.123", age=2 * directory.IDLE),
        temporary(run, os.getpid(), step=4),
    ]
    alive = [
        temporary(run, os.getppid()),
        temporary(run, 4712, "another-host.123", age=directory.IDLE / 2),
    ]
    (run / ".step_notes").mkdir()
    (run / "notes.txt").write_text("mine")
    write(run, 5)
    assert not any(path.exists() for path in gone)
    assert all((path / "rank_00000.h5").exists() for path in alive)
    assert (run / ".step_notes").exists() and (run / "notes.txt").exists()


def test_a_checkpoint_set_aside_is_found_and_put_back(run):
    """Killed between setting the old one aside and putting the new one in its place."""
    (run / "step_00000002").rename(run / f".step_00000002.old-{dead_process()}@{directory._host()}-0123abcd")
    assert version_at(run) == 2
    assert len(checkpoints(run)) == 2
    write(run, 3)
    assert version_at(run / "step_00000002") == 2 and version_at(run) == 3


def test_a_live_neighbour_keeps_what_it_set_aside(run):
    aside = (run / "step_00000001").rename(run / f".step_00000001.old-{os.getppid()}@{directory._host()}-0123abcd")
    write(run, 3, keep=None)
    assert aside.exists()


def test_reading_changes_nothing(run):
    path = temporary(run, dead_process())
    before = sorted(run.rglob("*"))
    open_checkpoint(run).verify()
    assert sorted(run.rglob("*")) == before and path.exists()
    os.chmod(run, 0o500)
    with permissions():
        assert version_at(run) == 2
    os.chmod(run, 0o700)


def test_a_link_of_the_length_of_the_file_is_still_a_link(tmp_path):
    path = save(tmp_path, 1, [], {}, Mesh(), storage="mpio")
    data, elsewhere = path / "tensors.h5", tmp_path / "elsewhere.h5"
    length = data.stat().st_size
    data.rename(elsewhere)
    data.symlink_to(str(tmp_path) + "/" * (length - len(str(elsewhere)) + 1) + elsewhere.name)
    assert data.lstat().st_size == length and data.stat().st_size == length
    with pytest.raises(CheckpointError, match="not a plain file"):
        open_checkpoint(path)


def test_half_a_checkpoint_is_never_visible(run, monkeypatch, caplog):
    """Removing one fails half way: it has another name by then, the save counts, and the next one finishes the work."""

    def broken(path):
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(directory.shutil, "rmtree", broken)
        write(run, 3, keep=1)
    assert sorted(p.name for p in run.glob("step_*")) == ["step_00000003"]
    assert "cannot remove" in caplog.text and len(list(run.glob(".step_*.tmp-*"))) == 2
    write(run, 4, keep=1)
    assert sorted(p.name for p in run.iterdir()) == ["latest", "step_00000004"]
