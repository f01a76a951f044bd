"""Locks when several processes act at once, or die half way; and a run that was taken for dead."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from hpcmp.checkpoint import CheckpointSaveError, Lock, checkpoints, directory, lock
from hpcmp.checkpoint.owner import Owner, this_process
from hpcmp.errors import InUseError
from tests.checkpoint.cases import version_at, write
from tests.checkpoint.locks import dead_process, forge, neighbour, until

PATIENCE = 200  # seconds
pytestmark = pytest.mark.timeout(300)


def slowed(call):
    """Now and then other processes act before a call does."""

    def late(*args):
        time.sleep(random.choice([0, 0, 0.001, 0.004]))
        return call(*args)

    return late


def contend(folder, rounds, barrier, wins):
    random.seed(os.getpid())
    lock._create, lock._read, lock._remove = slowed(lock._create), slowed(lock._read), slowed(lock._remove)
    for _ in range(rounds):
        mine = Lock(folder)
        barrier.wait(PATIENCE)
        try:
            mine.take()
            with wins.get_lock():
                wins.value += 1
        except InUseError:
            pass
        barrier.wait(PATIENCE)
        mine.release()
        barrier.wait(PATIENCE)
    os._exit(0)


@pytest.mark.parametrize("left", ["a lock", "a lock and its claim", "nothing"])
def test_of_many_at_once_one_takes_it(tmp_path, left):
    """Again and again: a dead run's lock, or none, and four processes that want it at the same moment."""
    rounds, fork = 25, multiprocessing.get_context("fork")
    barrier, wins = fork.Barrier(5), fork.Value("i", 0)
    processes = [fork.Process(target=contend, args=(tmp_path, rounds, barrier, wins), daemon=True) for _ in range(4)]
    gone = dead_process()
    for process in processes:
        process.start()
    for number in range(rounds):
        if left != "nothing":
            found = lock._read(forge(tmp_path, pid=gone))
            if left != "a lock":
                (tmp_path / f".lock-{found.digest}").write_bytes(found.text)
        barrier.wait(PATIENCE)
        barrier.wait(PATIENCE)
        assert wins.value == number + 1
        barrier.wait(PATIENCE)
    for process in processes:
        process.join(PATIENCE)
    assert list(tmp_path.iterdir()) == []


def test_a_slow_breaker_leaves_the_lock_of_the_one_that_was_faster(tmp_path, monkeypatch):
    """It has found the dead owner's lock; before it acts, that lock is gone and another's is in its place."""
    forge(tmp_path, pid=dead_process())
    fast, slow = Lock(tmp_path), Lock(tmp_path)
    look = slow._death

    def long(found):
        monkeypatch.setattr(slow, "_death", look)
        how = look(found)
        fast.take()
        return how

    monkeypatch.setattr(slow, "_death", long)
    with pytest.raises(InUseError):
        slow.take()
    assert (tmp_path / "lock").read_bytes() == fast._text
    fast.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("last", ["lock", "claim"])
def test_a_breaker_is_killed_half_way(tmp_path, last):
    """Before it removes the lock, or its claim to it."""
    path = forge(tmp_path, pid=dead_process())
    child = os.fork()
    if child == 0:
        unlink = Path.unlink

        def die(self, missing_ok=False):
            if (self == path) == (last == "lock"):
                os.kill(os.getpid(), signal.SIGKILL)
            unlink(self, missing_ok)

        Path.unlink = die
        try:
            Lock(tmp_path).take()
        finally:
            os._exit(3)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert path.exists() == (last == "lock") and len(list(tmp_path.glob(".lock-*"))) == 1
    with Lock(tmp_path):
        assert Owner.parse(path.read_bytes()).is_me
    assert not path.exists() and (last == "claim" or list(tmp_path.iterdir()) == [])


def test_a_claim_that_is_held_is_waited_for_and_then_named(tmp_path, quick):
    found = lock._read(forge(tmp_path, pid=dead_process()))
    (tmp_path / f".lock-{found.digest}").write_bytes(this_process().render())
    with pytest.raises(InUseError, match=r"remove it and .*/\.lock-\* by hand"):
        Lock(tmp_path).take()
    assert (tmp_path / "lock").read_bytes() == found.text


def test_an_owner_that_was_taken_for_dead_finds_out_and_saves_no_more(tmp_path, quick, caplog):
    write(tmp_path, 1)
    mine = Lock(tmp_path)
    mine.take()
    write(tmp_path, 2)
    theirs = neighbour(tmp_path).read_bytes()
    (tmp_path / f".step_00000009.tmp-{dead_process()}@{directory._host()}-0123abcd").mkdir()  # not for it to sweep
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointSaveError, match=f"step 3 is not saved: .* is in use by process {os.getppid()} "):
        write(tmp_path, 3)
    assert sorted(tmp_path.rglob("*")) == before and version_at(tmp_path) == 2
    until(lambda: mine.lost)
    assert mine.lost.startswith(f"{tmp_path} has been taken over by process {os.getppid()} ")
    assert "took this run for dead" in caplog.text
    mine.release()
    assert (tmp_path / "lock").read_bytes() == theirs


def test_a_lock_that_is_lost_during_a_save(tmp_path):
    """Between the beginning and the commit: what was written goes, and all is as it was."""
    write(tmp_path, 1)
    commit = directory.commit

    def late(*args):
        neighbour(tmp_path)
        commit(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory, "commit", late)
        with pytest.raises(CheckpointSaveError, match="in use by"):
            write(tmp_path, 2)
    assert checkpoints(tmp_path) == [tmp_path / "step_00000001"] and not list(tmp_path.glob(".step*"))
