"""The harness on planted suites: whatever ranks do, the run ends in seconds and names test, rank and cause."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import job, launch

pytestmark = pytest.mark.timeout(180)  # seconds suffice, but the machine may be busy
PLANTED = """
import os, signal, pytest
pytestmark = pytest.mark.mpi(min_size=2)
seen = []

def test_one_rank_raises(world):
    print("said before")
    if world.rank == 1:
        raise ValueError("planted on rank 1")
    world.Barrier()

def test_one_rank_fails_and_none_waits(world):
    seen.append("this job")
    assert world.rank != 0

def test_in_a_new_job(world):
    assert not seen
    assert world.allreduce(1) == world.size

def test_every_rank_fails(world):
    seen.append("this job")
    assert world.size == 0, object()

def test_in_the_same_job(world):
    assert seen

def test_crash(world):
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    world.Barrier()

@pytest.mark.timeout(2)
def test_hang(world):
    if world.rank == 1:
        world.recv(source=0, tag=99)
    world.Barrier()

def test_exit(world):
    if world.rank == 0:
        os._exit(0)
    world.Barrier()

@pytest.mark.parametrize("name", ["MPI" if {"OMPI_COMM_WORLD_RANK", "PMI_RANK"} & {*os.environ} else "-"])
def test_not_the_same_everywhere(world, name):
    pass

def test_last(world):
    world.Barrier()
"""


class Run:
    """pytest on a planted suite, on 2 ranks, in a process and a temporary folder of its own."""

    def __init__(self, folder: Path, suite: str, ranks: str = "2", **given: str) -> None:
        (folder / "conftest.py").write_text('pytest_plugins = ["tests.conftest"]\n')
        (folder / "test_planted.py").write_text(suite)
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        environment = {"HPCMP_TEST_RANKS": ranks, "TMPDIR": str(self.temporary), "PYTHONPATH": str(launch.ROOT)}
        command = [sys.executable, "-m", "pytest", "-c", f"{launch.ROOT}/pyproject.toml", f"--rootdir={folder}"]
        self.process = subprocess.Popen(
            [*command, "-p", "no:cacheprovider", str(folder)],
            env=os.environ | environment | given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def output(self) -> str:
        try:
            return self.process.communicate(timeout=170)[0]
        finally:
            self.process.kill()

    def processes(self) -> list[str]:
        """The command lines of this run's jobs that are still alive."""
        alive = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                alive.append(path.read_bytes().decode().replace("\0", " "))
        return [line for line in alive if f"{self.temporary}/" in line]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, str]]:
    run = Run(tmp_path_factory.mktemp("planted"), PLANTED)
    yield run, run.output()


def section(output: str, test: str) -> str:
    """What the report says on one failed test."""
    assert f" {test}@2 _" in output, f"{test} is not reported as failed:\n{output}"
    return output.split(f" {test}@2 _", 1)[1].partition("\n__")[0].partition("\n===")[0]


@pytest.mark.parametrize(
    ("test", "told"),
    [
        ("test_one_rank_raises", "rank 1 of 2: ValueError: planted on rank 1"),
        ("test_one_rank_raises", "said before"),
        ("test_one_rank_raises", "rank 0 of 2: no answer 2 s later"),
        ("test_one_rank_raises", "line 10 in test_one_rank_raises"),
        ("test_one_rank_fails_and_none_waits", "rank 0 of 2: assert 0 != 0"),
        ("test_every_rank_fails", "every rank of 2: AssertionError: <object object at 0x"),
        ("test_crash", "rank 1 of 2 crashed: Fatal Python error: Segmentation fault"),
        ("test_crash", "line 29 in test_crash"),
        ("test_hang", "every rank of 2: no answer within 2 s"),
        ("test_hang", "line 35 in test_hang"),
        ("test_hang", "line 36 in test_hang"),
        ("test_exit", "every rank of 2 ended without a result"),
        ("test_not_the_same_everywhere[-]", "no such test under mpirun"),
    ],
)
def test_a_failure_names_rank_and_cause(planted: tuple[Run, str], test: str, told: str) -> None:
    text = section(planted[1], test)
    assert told in text
    assert "_pytest/" not in text


def test_the_other_tests_still_run(planted: tuple[Run, str]) -> None:
    run, output = planted
    assert "2 ranks: 3 passed, 7 failed" in output
    assert "= 7 failed, 3 passed in " in output.splitlines()[-1]
    assert run.process.returncode == 1


def test_nothing_is_left_behind(planted: tuple[Run, str]) -> None:
    run, _ = planted
    assert run.processes() == []
    assert [path.name for path in run.temporary.iterdir() if not path.name.startswith("pytest-of-")] == []


def test_ranks_end_with_a_killed_pytest(tmp_path: Path) -> None:
    run = Run(tmp_path, "import time, pytest\n@pytest.mark.mpi\ndef test_sleep(): time.sleep(60)")
    end = time.monotonic() + 60
    while len(alive := run.processes()) < 3 and time.monotonic() < end:  # mpirun, which is several programs first
        time.sleep(0.05)
    run.process.kill()
    assert len(alive) >= 3
    while run.processes() and time.monotonic() < end:
        time.sleep(0.05)
    assert run.processes() == []


def test_a_file_that_does_not_import_is_told_once(tmp_path: Path) -> None:
    suite = """
import sys, pytest
if "mpi4py.MPI" in sys.modules and sys.modules["mpi4py.MPI"].COMM_WORLD.rank == 1:
    raise ImportError("planted on rank 1")
pytestmark = pytest.mark.mpi(min_size=2)
def test_one(world): pass
def test_two(world): pass
"""
    output = Run(tmp_path, suite).output()
    assert "rank 1 of 2 ended without a result" in output or "every rank of 2 ended without a result" in output
    failures = output.partition("short test summary")[0]  # which repeats them whole where CI is set
    assert failures.count("E   ImportError: planted on rank 1") == 1
    assert "the job on 2 ranks does not start (see the first failure)" in section(output, "test_two")


def test_no_test_for_these_rank_counts_is_an_error(tmp_path: Path) -> None:
    run = Run(tmp_path, PLANTED, ranks="1")
    assert "no multi-rank test can run: all need more ranks than HPCMP_TEST_RANKS=1" in run.output()
    assert run.process.returncode != 0


@pytest.mark.parametrize(("ranks", "told"), [("2", [2]), ("", [2, 5])])
def test_a_test_for_just_so_many_ranks_runs_on_those(tmp_path: Path, ranks: str, told: list[int]) -> None:
    suite = """
import pytest
@pytest.mark.parametrize("size", [pytest.param(n, marks=pytest.mark.mpi(size=n)) for n in (2, 5)])
def test_size(world, size): assert world.size == size
"""
    output = Run(tmp_path, suite, ranks).output()
    assert [line for line in output.splitlines() if " ranks: " in line] == [f"{n} ranks: 1 passed" for n in told]


MPIO = """
import pytest
pytestmark = pytest.mark.mpio
def test_serial(): pass
@pytest.mark.mpi
def test_ranked(world): pass
@pytest.mark.mpi(min_size=5)
def test_never(world): pass
"""


def test_without_parallel_hdf5_its_tests_are_skipped_and_the_summary_says_why(tmp_path: Path) -> None:
    given = {"HPCMP_MPIO_PYTHON": "", "HPCMP_MPIO_MISSING": "planted reason"}
    run = Run(tmp_path, MPIO, "2,4,8", **given)
    output = run.output()
    assert "mpio: 3 skipped: planted reason" in output.splitlines()  # the serial one, on 2 ranks and on 4
    assert "= 3 skipped in " in output.splitlines()[-1] and run.process.returncode == 0


def test_an_interpreter_without_parallel_hdf5_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, MPIO, HPCMP_MPIO_PYTHON="/bin/false")
    assert "HPCMP_MPIO_PYTHON=/bin/false: its h5py has no MPI" in run.output()
    assert run.process.returncode != 0


def test_the_pass_on_mpich_has_the_tests_of_faults_alone(tmp_path: Path) -> None:
    suite = """
import pytest
@pytest.mark.fault(9)
def test_serial(): pass
@pytest.mark.fault(12)
@pytest.mark.mpi
def test_ranked(world): assert world.size == 2
def test_other(): assert False
"""
    run = Run(tmp_path, suite, HPCMP_TEST_MPICH="1")
    output = run.output()
    assert "mpich: 2 passed" in output.splitlines() and "1 deselected" in output
    assert run.process.returncode == 0


def test_worlds_of_size_one_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_mpirun(ranks: int, argv: list[str], directory: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
        script = f'for r in $(seq 0 {ranks - 1}); do OMPI_COMM_WORLD_RANK=$r "$@" & done; wait'
        return subprocess.Popen(
            ["bash", "-c", script, "-", *argv], env=launch.mpi_environment() | env, start_new_session=True
        )

    monkeypatch.setattr(launch, "start", without_mpirun)
    planted = job.Job(2, ["test_planted.py::test"], [], [])
    try:
        assert "mpirun -n 2 made 2 worlds of size 1" in planted.started().text
    finally:
        planted.close()


def test_run_mpi(run_mpi: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    program = "import os, sys; from mpi4py import MPI; print(MPI.COMM_WORLD.size, os.environ['KEY']); sys.exit(3)"
    done = run_mpi(2, [sys.executable, "-c", program], env={"KEY": "value"})
    assert done.returncode == 3
    assert done.stdout.splitlines() == ["2 value"] * 2


def test_run_mpi_ends_a_job_that_hangs(
    run_mpi: Callable[..., subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    started, start = [], launch.start

    def watched(*arguments) -> subprocess.Popen[bytes]:
        started.append(start(*arguments))
        return started[0]

    monkeypatch.setattr(launch, "start", watched)
    program = "from mpi4py import MPI; print('in the hang', flush=True); MPI.COMM_WORLD.recv()"
    with pytest.raises(AssertionError, match=r"ran past 3 s\nin the hang"):
        run_mpi(2, [sys.executable, "-c", program], timeout=3)
    assert launch._session(started[0].pid) == []


def test_shared_memory_of_a_killed_job_is_removed(
    run_mpi: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    program = """
import mmap, os, tempfile, time
file = tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="hpcmp-test-", delete=False)
file.truncate(4096)
mapped = mmap.mmap(file.fileno(), 4096)
print(file.name, flush=True)
time.sleep(60)
"""
    with pytest.raises(AssertionError, match="/dev/shm/hpcmp-test-") as raised:
        run_mpi(1, [sys.executable, "-c", program], timeout=2)
    assert not Path(str(raised.value).split()[-1]).exists()
