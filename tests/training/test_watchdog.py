"""The watchdog: whatever a rank of a job does, the job ends, with the rank, the call and the line named."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import TYPE_CHECKING

import pytest

from hpcmp.comm.mesh import Mesh
from hpcmp.training.diagnosis import diagnose
from hpcmp.training.dumps import FOLDER, alive_name
from hpcmp.training.watchdog import Watchdog, watch
from tests import corpus
from tests.training import hanging

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

Run = Callable[..., CompletedProcess[str]]
pytestmark = pytest.mark.timeout(180)


def line(text: str) -> str:
    """``hanging.py:LINE`` of the first line of the program that has ``text``."""
    path = Path(hanging.__file__)
    at = next(i for i, line in enumerate(path.read_text().splitlines(), 1) if text in line)
    return f"{path}:{at}"


LAST = 'mesh["dp"].all_reduce(np.ones(16, np.float32))'
#: What the first line of the verdict says of each way to hang, of 3 ranks.
HANGS = {
    "absent": [
        f"rank 2 has not joined all_reduce 4 of dp (float32, 16) at {line(LAST)}, in which ranks 0-1 wait since ",
        f"; rank 2 is at {line('time.sleep(600)')} absent: time.sleep(600)",
    ],
    "stopped": ["rank 2 has not joined all_reduce 4 of dp (float32, 16) at ", "; rank 2 left no dump"],
    "holding": [
        "rank 2 is stuck in a call that keeps Python from running, File ",
        f'hanging.py", line {line("ctypes.PyDLL").rpartition(":")[2]} in holding (process ',
    ],
    "object": ["rank 2 has not joined gather_objects 2 of all ranks at ", ", in which ranks 0-1 wait since "],
    "dtype": ["ranks disagree in collective 4 of dp: rank 0: all_reduce (int32, 64) at ", "; ranks 1-2: all_reduce (f"],
    "message": ["ranks wait for one another:"],
}


def go(run_mpi: Run, tmp_path: Path, how: str, *options: str) -> CompletedProcess[str]:
    argv = [*options, sys.executable, "-m", "tests.training.hanging", str(tmp_path), "2" if how == "slow" else "1", how]
    root = str(Path(hanging.__file__).parents[2])
    return run_mpi(3, argv, timeout=120, env={"PYTHONPATH": root})


@pytest.mark.parametrize("how", HANGS)
def test_a_job_that_hangs_ends_and_names_the_rank(run_mpi: Run, tmp_path: Path, how: str) -> None:
    done = go(run_mpi, tmp_path, how)
    verdict = [text for text in done.stderr.splitlines() if text.startswith("hpcmp: ")]
    assert done.returncode == 69 and verdict, done.stderr
    for part in HANGS[how]:
        assert part in verdict[0]
    assert done.stderr.startswith(verdict[0])  # nothing comes before it
    assert [text.removeprefix("hpcmp: ") for text in verdict] == diagnose(tmp_path)
    assert (tmp_path / FOLDER / "verdict.txt").read_text().splitlines() == diagnose(tmp_path)
    told = json.loads((tmp_path / FOLDER / "rank_00000.json").read_text())
    assert told["rank"] == 0 and told["size"] == 3 and "hpcmp watchdog" in told["threads"]


def test_a_job_that_was_suspended_goes_on(run_mpi: Run, tmp_path: Path) -> None:
    """Its ranks have waited for longer than they may by the clock, and for nobody."""
    done = go(run_mpi, tmp_path, "suspended")
    assert done.returncode == 0 and done.stdout.count("done") == 3, done.stderr


def test_a_rank_that_is_late_ends_nothing(run_mpi: Run, tmp_path: Path) -> None:
    done = go(run_mpi, tmp_path, "slow")
    assert done.returncode == 0 and done.stdout.count("done") == 3
    assert list((tmp_path / FOLDER).iterdir()) == [] and diagnose(tmp_path) == []


def test_a_rank_that_is_killed_ends_the_job(run_mpi: Run, tmp_path: Path) -> None:
    """By the hand of mpirun, which names the process: Open MPI's the right one."""
    done = go(run_mpi, tmp_path, "killed")
    owner = json.loads((tmp_path / FOLDER / alive_name(2)).read_text())
    named = f"PID {owner['pid']} " in done.stderr
    assert done.returncode == 137 and named or done.returncode == 9


def test_a_rank_that_is_killed_is_named_where_the_launcher_goes_on(run_mpi: Run, tmp_path: Path) -> None:
    """As srun does without --kill-on-bad-exit: its neighbour on the node sees it."""
    if "Hydra" in launcher(run_mpi):
        pytest.skip("MPICH's ends all processes, whatever it is told")
    done = go(run_mpi, tmp_path, "killed", "--continuous")
    verdict = [text for text in done.stderr.splitlines() if text.startswith("hpcmp: ")]
    assert verdict[0].startswith("hpcmp: rank 2 is gone: process "), done.stderr
    assert "rank 2 has not joined all_reduce 4 of dp" in verdict[1]
    assert done.returncode != 0


def test_a_rank_that_crashes_leaves_its_stack(run_mpi: Run, tmp_path: Path) -> None:
    done = go(run_mpi, tmp_path, "crashed")
    assert done.returncode not in (0, 69)
    where = line("ctypes.string_at").replace(":", '", line ')
    found = diagnose(tmp_path)[0]
    assert found.startswith(f'rank 2 has crashed: Fatal Python error: Segmentation fault, File "{where} in crashed (')


def test_an_exception_ends_the_job_with_its_traceback_first(run_mpi: Run, tmp_path: Path) -> None:
    start = time.monotonic()
    done = go(run_mpi, tmp_path, "raised")
    assert done.returncode == 70 and time.monotonic() - start < 60
    lines = done.stderr.splitlines()
    assert lines[0].startswith("hpcmp: rank 2 of 3 on host ") and lines[1].startswith("Traceback")
    assert "ValueError: planted" in lines


def launcher(run_mpi: Run) -> str:
    program = "import os; print('Hydra' if 'MPI_LOCALRANKID' in os.environ else 'other')"
    return run_mpi(1, [sys.executable, "-c", program], timeout=60).stdout


@pytest.mark.mpi(min_size=2)
def test_files_come_and_go(world: Intracomm, mpi_tmp_path: Path) -> None:
    folder = mpi_tmp_path / FOLDER
    if world.rank == 0:
        folder.mkdir()
        (folder / "hang").touch()  # of an earlier attempt
    world.Barrier()
    with Mesh(world, dp=world.size) as mesh:
        watchdog = Watchdog(mpi_tmp_path, mesh, 60)
        world.Barrier()
        assert sorted(path.name for path in folder.iterdir()) == [alive_name(rank) for rank in range(world.size)]
        assert (mpi_tmp_path / "diagnosis.old" / "hang").exists()
        assert watchdog.processes[world.rank].pid == os.getpid()
        world.Barrier()
        watchdog.stop()
        world.Barrier()
        assert list(folder.iterdir()) == []


@pytest.mark.mpi
def test_none_is_needed(world: Intracomm, mpi_tmp_path: Path) -> None:
    with Mesh(world, dp=world.size) as mesh:
        assert watch(mpi_tmp_path, mesh, 0) is None
        if world.size == 1:
            assert watch(mpi_tmp_path, mesh, 60) is None


#: ``hpcmp train`` whose last rank does in its third step what it is told.
PROGRAM = """
import sys, time
from hpcmp.cli import main
from hpcmp.training.engine import Engine

right = Engine.step
def step(self, number, *data, **options):
    if number == 2 and self.mesh.rank == self.mesh.size - 1:
        if sys.argv[1] == "sleep":
            time.sleep(600)
        raise ValueError("planted")
    return right(self, number, *data, **options)

Engine.step = step
sys.exit(main(["train", *sys.argv[2:]]))
"""


def train(run_mpi: Run, folder: Path, how: str, *overrides: str) -> CompletedProcess[str]:
    toml = corpus.config(folder, corpus.corpus(folder))
    root = str(Path(hanging.__file__).parents[2])
    argv = [sys.executable, "-c", PROGRAM, how, str(toml), "train.watchdog=3", "layout.tp=2", *overrides]
    return run_mpi(2, argv, timeout=120, env={"PYTHONPATH": root})


def test_a_training_run_that_hangs(run_mpi: Run, tmp_path: Path) -> None:
    done = train(run_mpi, tmp_path, "sleep")
    verdict = diagnose(tmp_path / "run")
    assert done.returncode == 69 and f"hpcmp: {verdict[0]}\n" in done.stderr
    assert verdict[0].startswith("rank 1 has not joined ") and " of tp (float32, " in verdict[0]
    assert " at hpcmp/" in verdict[0] and "; rank 1 is at <string>:10 step" in verdict[0]


def test_an_exception_in_a_training_run(run_mpi: Run, tmp_path: Path) -> None:
    done = train(run_mpi, tmp_path, "raise", "train.check_collectives=true")
    assert done.returncode == 70
    _, _, after = done.stderr.partition("hpcmp: rank 1 of 2 on host ")
    assert after.splitlines()[1].startswith("Traceback") and "\nhpcmp: error: internal error: ValueError: pl" in after
