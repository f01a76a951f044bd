"""The watchdog: whatever a rank of a job does, the job ends, with the rank, the call and the line named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess
from typing import TYPE_CHECKING

import pytest

from hpcmp.comm.mesh import Mesh
from hpcmp.training.diagnosis import diagnose
from hpcmp.training.dumps import FOLDER, HANG, alive_name, dump_name
from hpcmp.training.failures import read_failures
from hpcmp.training.watchdog import Watchdog, watch
from tests import corpus
from tests.harness import launch
from tests.training import hanging

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

Ended = tuple[CompletedProcess[str], Path]  # a job, and its run's directory
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
    "counts": ["ranks disagree in collective 4 of dp: ranks 0-1: broadcast (float64, 128, root 0) at ", "; rank 2: br"],
}


#: ``hpcmp train`` whose last rank does in its third step what it is told.
PROGRAM = """
import sys, time
import numpy as np
from hpcmp.cli import main
from hpcmp.training.engine import Engine

right = Engine.begin
def begin(self, number, *data, **options):
    last = self.mesh.rank == self.mesh.size - 1
    if number == 2:
        if sys.argv[1] == "counts":
            self.mesh["tp"].broadcast(np.ones(64 if last else 128)).wait()
        elif last and sys.argv[1] == "sleep":
            time.sleep(600)
        elif last:
            raise ValueError("planted")
    return right(self, number, *data, **options)

Engine.begin = begin
sys.exit(main(["train", *sys.argv[2:]]))
"""


def run(how: str, folder: Path) -> Ended:
    """``absent``: a function of hanging.py, ``absent --continuous``: so launched; ``train sleep``: of PROGRAM."""
    first, _, option = how.partition(" ")
    environment = {"PYTHONPATH": str(launch.ROOT)}
    if first == "train":
        toml = str(corpus.config(folder, corpus.corpus(folder)))
        given = ["layout.tp=2", "train.watchdog=4", "train.kernels=reference"]
        given += ["train.check_collectives=true"] if option == "raise" else []
        argv = [sys.executable, "-c", PROGRAM, option, toml, *given]
        return launch.run_mpi(2, argv, timeout=120, env=environment), folder / "run"
    seconds = "8" if first in ("counts", "slow") else "2"
    argv = [sys.executable, "-m", "tests.training.hanging", str(folder), seconds, first]
    return launch.run_mpi(3, [option, *argv] if option else argv, timeout=120, env=environment), folder


@pytest.fixture(scope="module")
def jobs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Ended]]]:
    """The jobs of all tests that are to be run, some at a time, since most of their time they wait."""
    here = [item for item in request.session.items if item.path == request.path]
    wanted = [item.callspec.params["job"] for item in here if "job" in getattr(item, "fixturenames", ())]
    with ThreadPoolExecutor(3) as pool:
        found = {how: pool.submit(run, how, tmp_path_factory.mktemp("job")) for how in wanted}
        yield found
        for each in found.values():
            each.cancel()


@pytest.fixture
def job(request: pytest.FixtureRequest, jobs: dict[str, Future[Ended]]) -> Ended:
    """The job of which the test's parameter says how it ends, once it has."""
    return jobs[request.param].result()


def ended(how: str, *more: str) -> pytest.MarkDecorator:
    """A test of such a job, or of each of several."""
    return pytest.mark.parametrize("job", [how, *more], indirect=True)


def verdict(done: CompletedProcess[str]) -> list[str]:
    """What hpcmp has said."""
    return [text for text in done.stderr.splitlines() if text.startswith("hpcmp: ")]


@ended(*HANGS)
@pytest.mark.fault(11, 12)
def test_a_job_that_hangs_ends_and_names_the_rank(job: Ended, request: pytest.FixtureRequest) -> None:
    (done, folder), how = job, request.node.callspec.params["job"]
    said = verdict(done)
    assert done.returncode == 69 and said, done.stderr
    for part in HANGS[how]:
        assert part in said[0]
    assert done.stderr.startswith(said[0]) or how == "counts"  # nothing comes before it but what MPI says itself
    verdicts = [text.removeprefix("hpcmp: ") for text in said]
    assert (folder / FOLDER / "verdict.txt").read_text().splitlines() == verdicts
    again = diagnose(folder)
    if how == "stopped":  # it may have gone on at the end, and taken back its sign of life, which has a line of its own
        assert verdicts.pop(1).startswith("rank 2 ") and again.pop(1).startswith("rank 2 ")
    assert again == verdicts
    told = json.loads((folder / FOLDER / "rank_00000.json").read_text())
    assert told["rank"] == 0 and told["size"] == 3 and "hpcmp watchdog" in told["threads"]


@ended("counts")
@pytest.mark.fault(11)
def test_an_error_of_mpi_is_told_and_nobody_waits_for_the_watchdog(job: Ended) -> None:
    done, folder = job
    if is_mpich():
        pytest.skip("MPICH's ranks all hang")
    _, error, *_ = verdict(done)
    assert error.startswith("hpcmp: rank 2: MPI_ERR_TRUNCATE: "), done.stderr
    assert ", in broadcast 4 of dp (float64, 64, root 0) at " in error
    whys = [json.loads((folder / FOLDER / dump_name(rank)).read_text())["why"] for rank in range(3)]
    assert whys[:2] == ["another rank has asked for it"] * 2 and whys[2].startswith("got MPI_ERR_TRUNCATE: ")


@ended("suspended")
def test_a_job_that_was_suspended_goes_on(job: Ended) -> None:
    """Its ranks have waited for longer than they may by the clock, and for nobody."""
    done, _ = job
    assert done.returncode == 0 and done.stdout.count("done") == 3, done.stderr


@ended("slow")
def test_a_rank_that_is_late_ends_nothing(job: Ended) -> None:
    done, folder = job
    assert done.returncode == 0 and done.stdout.count("done") == 3
    assert list((folder / FOLDER).iterdir()) == [] and diagnose(folder) == []


@ended("killed")
@pytest.mark.fault(10)
def test_a_rank_that_is_killed_ends_the_job(job: Ended) -> None:
    """By the hand of mpirun, which names the process: Open MPI's the right one."""
    done, folder = job
    owner = json.loads((folder / FOLDER / alive_name(2)).read_text())
    named = f"PID {owner['pid']} " in done.stderr
    assert done.returncode == 137 and named or done.returncode == 9


@ended("killed --continuous")
@pytest.mark.fault(10)
def test_a_rank_that_is_killed_is_named_where_the_launcher_goes_on(job: Ended) -> None:
    """As srun does without --kill-on-bad-exit: its neighbour on the node sees it."""
    if is_mpich():
        pytest.skip("MPICH's ends all processes, whatever it is told")
    done, _ = job
    said = verdict(done)
    assert said[0].startswith("hpcmp: rank 2 is gone: process "), done.stderr
    assert "rank 2 has not joined all_reduce 4 of dp" in said[1]
    assert done.returncode != 0


@ended("crashed")
@pytest.mark.fault(10)
def test_a_rank_that_crashes_leaves_its_stack(job: Ended) -> None:
    done, folder = job
    assert done.returncode not in (0, 69)
    where = line("ctypes.string_at").replace(":", '", line ')
    found = diagnose(folder)[0]
    assert found.startswith(f'rank 2 has crashed: Fatal Python error: Segmentation fault, File "{where} in crashed (')


@ended("raised")
@pytest.mark.fault(9)
def test_an_exception_ends_the_job_with_its_traceback_first_and_waits_for_nobody(job: Ended) -> None:
    done, folder = job
    assert done.returncode == 70
    lines = done.stderr.splitlines()
    assert lines[0].startswith("hpcmp: rank 2 of 3 on host ") and lines[1].startswith("Traceback")
    assert "ValueError: planted" in lines
    assert not (folder / FOLDER / HANG).exists() and not list((folder / FOLDER).glob("*.json"))
    assert diagnose(folder) == [f"rank 2: ValueError: planted, at {line('raise ValueError')} raised: {RAISES}"]


RAISES = 'raise ValueError("planted")'


def is_mpich() -> bool:
    """Whether the mpirun of these jobs is MPICH's."""
    environment = launch.mpi_environment(Path(sys.executable))
    told = subprocess.run(["mpirun", "--version"], env=environment, capture_output=True, text=True).stdout
    return "HYDRA" in told


@ended("train sleep")
@pytest.mark.fault(12)
def test_a_training_run_that_hangs(job: Ended) -> None:
    done, folder = job
    said = diagnose(folder)
    assert done.returncode == 69 and f"hpcmp: {said[0]}\n" in done.stderr
    assert said[0].startswith("rank 1 has not joined ") and " of tp (float32, " in said[0]
    assert " at hpcmp/" in said[0] and "; rank 1 is at <string>:14 begin" in said[0]


@ended("train counts")
@pytest.mark.fault(11)
def test_a_training_run_whose_ranks_disagree_on_a_count(job: Ended) -> None:
    done, folder = job
    said = diagnose(folder)
    assert done.returncode == 69 and f"hpcmp: {said[0]}\n" in done.stderr and "Traceback" not in done.stderr
    assert said[0].startswith("ranks disagree in collective ") and said[0].count(" at <string>:12") == 2
    assert " of tp: rank 0: broadcast (float64, 128, root 0)" in said[0]
    assert "; rank 1: broadcast (float64, 64, root 0)" in said[0]


@ended("train raise")
@pytest.mark.fault(9)
def test_an_exception_in_a_training_run(job: Ended) -> None:
    done, folder = job
    assert done.returncode == 70
    _, _, after = done.stderr.partition("hpcmp: rank 1 of 2 on host ")
    assert after.splitlines()[1].startswith("Traceback") and "\nhpcmp: error: internal error: ValueError: pl" in after
    [left] = read_failures(folder / FOLDER)
    assert (left.rank, left.size, left.error) == (1, 2, "ValueError: planted") and left.place.startswith("<string>:16")


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
