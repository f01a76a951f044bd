"""Processes that die or run out of room while they save: what was saved before is always there to load."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from hpcmp.checkpoint import CheckpointSaveError, open_checkpoint, save
from hpcmp.comm.mesh import Mesh
from tests.checkpoint.cases import MPIO, TOGETHER, killed_in, version_at, visible, write
from tests.checkpoint.kills import BEHIND, OF_RANK_0, kills
from tests.harness import mpio

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(300)
PHASES = ["create", "write", "fsync", "digest", "manifest", "rename", "replace", "pointer", "prune"]


@pytest.mark.parametrize("storage", ["files", "shared"])
@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase != "replace"])
def test_killed_while_saving_the_next_step(tmp_path, phase, storage):
    write(tmp_path, 1, storage=storage)
    write(tmp_path, 2, storage=storage)
    killed_in(phase, lambda: write(tmp_path, 3, 3, storage=storage))
    assert version_at(tmp_path) == (3 if phase == "prune" else 2)
    assert version_at(tmp_path / "step_00000002") == 2
    assert version_at(tmp_path / "step_00000001") == 1
    assert open_checkpoint(tmp_path).verify() == []
    write(tmp_path, 3, 7, storage=storage)
    assert version_at(tmp_path) == 7
    assert visible(tmp_path) == ["latest", "step_00000002", "step_00000003"]


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("phase", PHASES)
def test_killed_while_saving_a_step_again(tmp_path, phase, keep):
    write(tmp_path, 1, keep=None)
    write(tmp_path, 2, keep=keep)
    killed_in(phase, lambda: write(tmp_path, 2, 7, keep=keep))
    assert version_at(tmp_path) == (7 if phase in ("pointer", "prune") else 2)
    write(tmp_path, 3, 8, keep=2)
    assert version_at(tmp_path) == 8
    assert version_at(tmp_path / "step_00000002") == (7 if phase in ("pointer", "prune") else 2)
    assert visible(tmp_path) == ["latest", "step_00000002", "step_00000003"]


def test_killed_at_the_very_first_save(tmp_path):
    for phase in ("write", "manifest", "rename"):
        killed_in(phase, lambda: write(tmp_path / "new" / "run", 1, 1))
    write(tmp_path / "new" / "run", 1)
    assert visible(tmp_path / "new" / "run") == ["latest", "step_00000001"]


@pytest.mark.parametrize("limit", [0, 100, 1000, 3000, 10_000, 30_000])
def test_a_limit_on_file_sizes(tmp_path, limit):
    """Also a stand-in for a full disk: the system's error is named, the rest is as it was, and the process is sound."""
    write(tmp_path, 1)
    before = sorted(tmp_path.rglob("*"))
    size = (tmp_path / "step_00000001" / "rank_00000.h5").stat().st_size
    assert limit < size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointSaveError, match=r"/rank_00000\.h5: File too large$"):
            write(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(tmp_path.rglob("*")) == before
    write(tmp_path, 2)
    assert version_at(tmp_path) == 2 and version_at(tmp_path / "step_00000001") == 1


def test_no_room_for_the_manifest(tmp_path):
    write(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(CheckpointSaveError, match=r"File too large$"):
            save(tmp_path, 2, [], {"long": 5000 * "x"}, Mesh())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert visible(tmp_path) == ["latest", "step_00000001"] and version_at(tmp_path) == 1


def test_a_process_that_could_not_save_ends_in_peace(tmp_path):
    """HDF5's library crashes at exit if it could not close a file; ours can always be closed."""
    program = (
        "import resource, pathlib, sys\n"
        "from hpcmp.checkpoint import CheckpointSaveError\n"
        "from tests.checkpoint.cases import write\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "try:\n"
        "    write(pathlib.Path(sys.argv[1]), 1)\n"
        "except CheckpointSaveError as error:\n"
        "    print(error)\n"
        "    sys.exit(7)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert (done.returncode, done.stderr) == (7, "") and "File too large" in done.stdout
    assert visible(tmp_path) == []


JOB = """
import os, resource, sys
from pathlib import Path
from mpi4py import MPI
from hpcmp.checkpoint import CheckpointSaveError, save
from hpcmp.comm.mesh import Mesh
from tests.checkpoint.cases import STATE, owned

mesh = Mesh(MPI.COMM_WORLD, tp=MPI.COMM_WORLD.size)
if os.environ.get("LIMIT_RANK") == str(mesh.rank):
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    save(Path(sys.argv[1]), 3, owned(mesh, 3), STATE, mesh, storage=sys.argv[3])
except CheckpointSaveError as error:
    Path(sys.argv[2], f"rank{mesh.rank}").write_text(str(error))
mesh.close()
"""


def job(run_mpi, ranks, root, tmp_path, storage, **env):
    python = mpio.python() if storage == "mpio" else sys.executable
    argv = [python, "-c", JOB, str(root), str(tmp_path), storage]
    return run_mpi(ranks, argv, timeout=240, env=env, cwd=ROOT)


SPOTS = [
    f"{phase}:{rank}"
    for phase in PHASES
    for rank in (0, 1, "all")
    if phase != "replace" and (rank == 0 or phase not in OF_RANK_0)
]
KILLED = [(where, TOGETHER[(i + i // 3) % 3]) for i, where in enumerate(SPOTS)]
KILLED += [
    pytest.param(where, *MPIO.values, marks=MPIO.marks) for where in ("write:1", "digest:1", "rename:0", "prune:all")
]


@pytest.mark.parametrize(("where", "storage"), KILLED)
def test_a_rank_is_killed(tmp_path, run_mpi, where, storage):
    """The launcher ends the job; the checkpoint before it is there, and the next save cleans up."""
    root = tmp_path / "run"
    write(root, 1)
    done = job(run_mpi, 2, root, tmp_path, storage, HPCMP_FAILPOINT=where)
    assert done.returncode != 0, f"{where} is not a phase of a save"
    assert version_at(root) == (3 if where.startswith("prune") else 1)
    write(root, 4)
    assert visible(root)[-1] == "step_00000004" and not any(name.startswith(".") for name in visible(root))


@pytest.mark.parametrize("storage", TOGETHER)
def test_one_rank_has_no_room(tmp_path, run_mpi, storage):
    """Every rank raises the same error, which names rank and file, and the job ends as it likes."""
    root = tmp_path / "run"
    write(root, 1)
    done = job(run_mpi, 3, root, tmp_path, storage, LIMIT_RANK="2")
    assert done.returncode == 0, done.stderr
    told = [(tmp_path / f"rank{rank}").read_text() for rank in range(3)]
    assert told[0] == told[1] == told[2]
    assert told[0].startswith(f"{root}: step 3 is not saved: rank 2: {root}/.step_00000003.tmp-")
    files = {"files": "rank_00002.h5", "node": "node_00000.h5"}
    assert f"{files.get(storage, 'tensors.h5')}: " in told[0]
    assert "File too large" in told[0]
    assert visible(root) == ["latest", "step_00000001"] and version_at(root) == 1


@pytest.mark.parametrize(("ranks", "settings", "count"), [(1, [], 6), (1, [BEHIND], 3), (2, [], 3), (2, [BEHIND], 2)])
def test_runs_that_are_killed_go_on(tmp_path, ranks, settings, count):
    """At full size: ``python -m tests.checkpoint.campaign kills``."""
    counts, wrong = kills(count, 1, ranks, settings, tmp_path, steps=8)
    assert not wrong, "\n".join(wrong)
    assert counts.total() == count
    assert sum(number for where, number in counts.items() if "too late" not in where) >= count * 2 // 3
