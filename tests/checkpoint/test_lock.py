"""The lock of a directory: one run has it, a second is refused, a dead one's is taken over."""

from __future__ import annotations

import logging
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcmp.checkpoint import Lock, lock, owner
from hpcmp.checkpoint.owner import this_process
from hpcmp.errors import InUseError
from tests.checkpoint.cases import version_at, write
from tests.checkpoint.locks import Clock, assert_taken, dead_process, elsewhere, forge, neighbour, until

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(300)
HOLD = """
import sys, time
from hpcmp.checkpoint import Lock
Lock(sys.argv[1]).take()
print("taken", flush=True)
time.sleep(3600)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout.readline() == b"taken\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_in_one_line_and_takes_over_when_the_first_is_killed(tmp_path, holder, caplog):
    with pytest.raises(InUseError) as caught:
        Lock(tmp_path).take()
    text = str(caught.value)
    assert text.startswith(f"{tmp_path} is in use by process {holder.pid} of ") and "\n" not in text
    assert this_process().host in text and " UTC: " in text and text.endswith(f"remove {tmp_path}/lock")
    assert caught.value.exit_code == 2
    with pytest.raises(InUseError):
        lock.check(tmp_path)
    holder.kill()
    until(lambda: owner._stat(holder.pid)[0] in ("Z", ""))
    lock.check(tmp_path)  # a zombie: nobody has waited for it
    with Lock(tmp_path):
        assert_taken(tmp_path)
        assert f"taken over from process {holder.pid} of " in caplog.text
        assert caplog.text.rstrip().endswith("that process has ended")
    assert list(tmp_path.iterdir()) == []


def test_the_end_of_a_process_is_the_end_of_its_lock(tmp_path, holder):
    holder.terminate()
    holder.wait()
    with Lock(tmp_path):
        assert_taken(tmp_path)


def test_one_process_takes_it_once(tmp_path):
    first = Lock(tmp_path)
    with first:
        with pytest.raises(InUseError, match=f"process {os.getpid()} "):
            Lock(tmp_path).take()
        lock.check(tmp_path)
    first.release()  # again: nothing happens
    with first:
        with pytest.raises(InUseError):
            first.take()
        assert_taken(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_machine_that_is_silent(tmp_path, quick, caplog):
    elsewhere(tmp_path)
    with pytest.raises(InUseError):
        lock.check(tmp_path)  # it does not wait
    start = time.monotonic()
    with Lock(tmp_path):
        assert_taken(tmp_path)
    assert time.monotonic() - start >= lock.MISSED * lock.BEAT
    assert "waiting for a sign of life" in caplog.text and "no sign of life in 0.25 s" in caplog.text


def test_another_machine_is_watched_once_for_both_of_its_locks(tmp_path, quick, caplog):
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        elsewhere(folder)
    with Lock(tmp_path / "a"), Lock(tmp_path / "b"):
        assert_taken(tmp_path / "b")
    assert caplog.text.count("waiting for a sign of life") == 1 and "it holds another lock" in caplog.text


@pytest.mark.parametrize("ahead", [-600, 0, 3600])
def test_another_machine_that_gives_a_sign_of_life(tmp_path, quick, ahead, monkeypatch):
    """Whatever its clock says, within what is allowed for."""
    path = elsewhere(tmp_path)

    def sign():
        os.utime(path, (time.time() + ahead,) * 2)

    sign()
    monkeypatch.setattr(lock, "time", Clock(*[lambda: None] * 3, sign))
    with pytest.raises(InUseError, match=r"process 4711 of \w+ on node7, since .* UTC"):
        Lock(tmp_path).take()
    assert lock.time.events == []


def test_another_machine_that_has_been_silent_for_long(tmp_path, caplog):
    path = elsewhere(tmp_path)
    os.utime(path, (time.time() - lock.FORGOTTEN - 60,) * 2)
    lock.check(tmp_path)
    with Lock(tmp_path):
        assert_taken(tmp_path)
    assert "no sign of life for 16 minutes" in caplog.text


def test_the_first_lock_comes_free_while_the_second_run_watches(tmp_path, quick, monkeypatch, caplog):
    monkeypatch.setattr(lock, "time", Clock(lambda: None, elsewhere(tmp_path).unlink))
    with Lock(tmp_path):
        assert_taken(tmp_path)
    assert "waiting for a sign of life" in caplog.text and "taken over" not in caplog.text


def test_the_owner_touches_it(tmp_path, quick):
    with Lock(tmp_path):
        os.utime(tmp_path / "lock", (0, 0))
        until(lambda: time.time() - (tmp_path / "lock").stat().st_mtime < 60)


def test_a_dead_runs_lock_keeps_nobody_from_saving(tmp_path):
    forge(tmp_path, pid=dead_process())
    write(tmp_path, 1)
    assert version_at(tmp_path) == 1


def test_a_lock_that_someone_removed_comes_back(tmp_path, quick, caplog):
    with Lock(tmp_path) as mine:
        (tmp_path / "lock").unlink()
        until(lambda: "someone removed it" in caplog.text)
        assert_taken(tmp_path)
        assert not mine.lost
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", [b"", b"{}", b"\xff" * 99])
def test_a_lock_that_says_nothing(tmp_path, quick, text):
    """As one that is just being made; or that was left by one that died while it made it."""
    path = tmp_path / "lock"
    path.write_bytes(text)
    with pytest.raises(InUseError, match="in use by a run that does not say who it is"):
        lock.check(tmp_path)
    os.utime(path, (0, 0))
    with Lock(tmp_path):
        assert_taken(tmp_path)


def test_a_lock_that_is_being_made_is_waited_for(tmp_path, monkeypatch):
    (tmp_path / "lock").touch()
    monkeypatch.setattr(lock, "time", Clock(*[lambda: None] * 3, lambda: neighbour(tmp_path)))
    with pytest.raises(InUseError, match=f"process {os.getppid()} "):
        Lock(tmp_path).take()


def test_a_directory_without_room(tmp_path):
    """A stand-in for a full disk: the error says which file, and no lock is left that says nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError, match="lock"):
            Lock(tmp_path).take()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        Lock(tmp_path / "nowhere").take()


def test_a_lock_cannot_be_a_directory(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(IsADirectoryError):
        Lock(tmp_path).take()


def test_what_is_taken_over_is_logged_and_what_is_free_is_not(tmp_path, caplog):
    with caplog.at_level(logging.DEBUG), Lock(tmp_path):
        pass
    assert caplog.text == ""
