"""Processes that die while a checkpoint is written behind the training: what was committed before is there to load."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hpcmp.checkpoint import Saver, open_checkpoint
from hpcmp.comm.mesh import Mesh
from tests.checkpoint.cases import killed_in, version_at, visible, write
from tests.checkpoint.test_saver import behind, polled

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(300)
PHASES = ["create", "snapshot", "write", "fsync", "digest", "manifest", "rename", "replace", "pointer", "prune"]


def save_behind(root, step, version, **options):
    """Save in the background, to the end of it."""
    saver = Saver(root, Mesh(), **options)
    behind(saver, step, version)
    polled(saver)


@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase != "replace"])
def test_killed_while_saving_the_next_step(tmp_path, phase):
    write(tmp_path, 1)
    write(tmp_path, 2)
    killed_in(phase, lambda: save_behind(tmp_path, 3, 3))
    assert version_at(tmp_path) == (3 if phase == "prune" else 2)
    assert [version_at(tmp_path / f"step_{step:08d}") for step in (1, 2)] == [1, 2]
    assert open_checkpoint(tmp_path).verify() == []
    write(tmp_path, 3, 7)
    assert version_at(tmp_path) == 7
    assert visible(tmp_path) == ["latest", "step_00000002", "step_00000003"]


@pytest.mark.parametrize("phase", PHASES)
def test_killed_while_saving_a_step_again(tmp_path, phase):
    write(tmp_path, 1, keep=None)
    write(tmp_path, 2, keep=1)
    killed_in(phase, lambda: save_behind(tmp_path, 2, 7, keep=1))
    assert version_at(tmp_path) == (7 if phase in ("pointer", "prune") else 2)
    write(tmp_path, 3, 8)
    assert version_at(tmp_path / "step_00000002") == (7 if phase in ("pointer", "prune") else 2)
    assert visible(tmp_path) == ["latest", "step_00000002", "step_00000003"]


JOB = """
import os, sys
from mpi4py import MPI
from hpcmp.checkpoint import Saver
from hpcmp.comm.mesh import Mesh
from tests.checkpoint.test_saver import behind, polled

mesh = Mesh(MPI.COMM_WORLD, tp=MPI.COMM_WORLD.size)
saver = Saver(sys.argv[1], mesh)
behind(saver, 2, 2)
polled(saver)
os.environ["HPCMP_FAILPOINT"] = sys.argv[2]
behind(saver, 3, 3)
polled(saver)
mesh.close()
"""

KILLED = [
    *("create:1", "snapshot:0", "snapshot:1", "snapshot:all", "write:0", "write:all", "fsync:0", "fsync:1"),
    *("digest:1", "digest:all", "manifest:0", "rename:0", "pointer:0", "prune:1", "prune:all"),
]


@pytest.mark.parametrize("where", KILLED)
def test_a_rank_is_killed(tmp_path, run_mpi, where):
    """The launcher ends the job; what was committed before is there, and the next save cleans up."""
    root = tmp_path / "run"
    write(root, 1)
    done = run_mpi(2, [sys.executable, "-c", JOB, str(root), where], timeout=240, cwd=ROOT)
    assert done.returncode != 0, f"{where} is not a phase of a save"
    assert version_at(root) == (3 if where.startswith("prune") else 2)
    assert version_at(root / "step_00000002") == 2
    write(root, 4)
    assert version_at(root) == 4 and visible(root)[-1] == "step_00000004"
    assert not any(name.startswith(".") for name in visible(root))
