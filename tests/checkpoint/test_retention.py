"""Which checkpoints stay: the newest, every so many steps, the best; and nothing else goes that should not."""

from __future__ import annotations

import logging
import math
import os
import signal

import pytest

from hpcmp.checkpoint import Keep, directory, manifest, retention, save
from hpcmp.comm.mesh import Mesh
from hpcmp.errors import InputError
from tests.checkpoint.cases import STATE, owned, version_at


def put(root, step, keep, loss=None, run="a"):
    mesh = Mesh()
    save(root, step, owned(mesh, step % 100), STATE | {"held_out_loss": loss, "run": run}, mesh, keep=keep)


def steps(root):
    return sorted(int(path.name[5:]) for path in root.glob("step_*"))


def test_the_newest_and_every_so_many_steps(tmp_path):
    there = []
    for step in range(1, 8):
        put(tmp_path, step, Keep(2, every=3))
        there.append(steps(tmp_path))
    assert there == [[1], [1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [3, 4, 5, 6], [3, 5, 6, 7]]
    assert all(version_at(tmp_path / f"step_{step:08d}") == step for step in steps(tmp_path))


def test_those_kept_for_ever_are_not_even_looked_at(tmp_path, monkeypatch):
    for step in range(10, 60, 10):
        put(tmp_path, step, Keep(1, every=10))
    looked = []
    inspect = directory.inspect
    monkeypatch.setattr(directory, "inspect", lambda path: looked.append(path.name) or inspect(path))
    put(tmp_path, 61, Keep(1, every=10))
    put(tmp_path, 62, Keep(1, every=10))
    assert steps(tmp_path) == [10, 20, 30, 40, 50, 62] and set(looked) == {"step_00000061"}


def test_the_best(tmp_path):
    losses = [3.0, 1.5, 2.0, 2.5, None, math.nan, 2.0, 4.0]
    there = []
    for step, loss in enumerate(losses, 1):
        put(tmp_path, step, Keep(1, best=2), loss)
        there.append(steps(tmp_path))
    assert there == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 3, 5], [2, 3, 6], [2, 7], [2, 7, 8]]  # of equals, the newer


def test_the_best_of_those_that_are_not_kept_for_ever(tmp_path):
    for step, loss in enumerate([2.0, 1.0, 3.0, 4.0], 1):
        put(tmp_path, step, Keep(1, every=2, best=1), loss)
    assert steps(tmp_path) == [1, 2, 3, 4]
    put(tmp_path, 5, Keep(1, every=2, best=1), 9.0)
    assert steps(tmp_path) == [1, 2, 4, 5]


@pytest.mark.parametrize("loss", ["1.0", True, [0.5], -math.inf])
def test_what_is_no_loss_is_not_the_best(tmp_path, loss):
    put(tmp_path, 1, Keep(1, best=1), loss)
    put(tmp_path, 2, Keep(1, best=1), 5.0)
    put(tmp_path, 3, Keep(1, best=1), 6.0)
    assert steps(tmp_path) == [2, 3]


def test_another_runs_are_left_alone(tmp_path):
    put(tmp_path, 1, 1, run="b")
    put(tmp_path, 2, 1, run=None)
    put(tmp_path, 3, 1)
    put(tmp_path, 4, 1)
    assert steps(tmp_path) == [1, 2, 4]


def test_what_is_not_complete_is_left_alone(tmp_path):
    put(tmp_path, 1, 1)
    (tmp_path / "step_00000001" / "rank_00000.h5").unlink()
    put(tmp_path, 2, 1)
    put(tmp_path, 3, 1)
    assert steps(tmp_path) == [1, 3]


def test_the_one_that_latest_names_stays(tmp_path):
    """Such as one that someone has gone back to while a save was on its way."""
    for step in (1, 2, 3):
        put(tmp_path, step, None)
    directory.point(tmp_path, "step_00000001", manifest.read(tmp_path / "step_00000001" / "manifest.json")[1])
    retention.prune(tmp_path, Keep(1), tmp_path / "step_00000003")
    assert steps(tmp_path) == [1, 3]


@pytest.mark.parametrize("where", ["scan", "pointed", "discard"])
def test_a_failure_ends_nothing(tmp_path, monkeypatch, caplog, where):
    def broken(*args):
        raise ValueError("planted")

    put(tmp_path, 1, 1)
    monkeypatch.setattr(retention, where, broken)
    with caplog.at_level(logging.WARNING):
        put(tmp_path, 2, 1)
    assert steps(tmp_path) == [1, 2] and version_at(tmp_path) == 2
    assert "cannot look for old checkpoints" in caplog.text and "planted" in caplog.text


def test_killed_while_one_is_removed(tmp_path, monkeypatch):
    """Half of one is never taken for a whole, and the next save takes the rest away."""
    put(tmp_path, 1, 1)

    def half(path):
        (path / "manifest.json").unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(directory.shutil, "rmtree", half)
        try:
            put(tmp_path, 2, 1)
        finally:
            os._exit(3)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert steps(tmp_path) == [2] and version_at(tmp_path) == 2 and len(list(tmp_path.glob(".step*"))) == 1
    put(tmp_path, 3, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000003"]


@pytest.mark.parametrize(
    ("numbers", "words"),
    [((0, None, 0), "keep=0"), ((2, 0, 0), "keep_every=0"), ((2, None, -1), "keep_best=-1")],
)
def test_numbers_that_cannot_be(numbers, words):
    with pytest.raises(InputError, match=words):
        Keep(*numbers)
