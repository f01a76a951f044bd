"""What the environment says of a job: MPIs real and made up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpcmp.comm import detect
from hpcmp.comm.detect import Share, launcher, oversubscription, wrong_mpiexec
from hpcmp.errors import InputError
from tests.batch.launchers import FLUX, HYDRA, JSRUN, OPEN_MPI, PALS, SRUN

VARIABLES = {name for job in (OPEN_MPI, HYDRA, SRUN, PALS, JSRUN, FLUX) for name in job}


@pytest.fixture
def environment(monkeypatch):
    """environment(job) puts this process into a job with these variables; it begins in none."""
    for name in VARIABLES | {"HPCMP_CUDA_AWARE", "MPICH_GPU_SUPPORT_ENABLED"}:
        monkeypatch.delenv(name, raising=False)

    def enter(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return enter


def test_one_world_of_all_ranks_is_right(environment):
    environment(OPEN_MPI)
    assert wrong_mpiexec(8) is None


def test_one_process_alone_is_right(environment):
    assert wrong_mpiexec(1) is None
    environment(OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"})
    assert wrong_mpiexec(1) is None


@pytest.mark.parametrize(("job", "name", "count"), [(OPEN_MPI, "Open MPI", 8), (HYDRA, "MPICH Hydra", 2)])
def test_worlds_of_one_rank_are_told_which_mpiexec_is_right(environment, monkeypatch, tmp_path, job, name, count):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mpiexec").write_text("")
    (tmp_path / "bin" / "mpiexec").chmod(0o755)
    monkeypatch.setattr(detect, "mpi_library", lambda: tmp_path / "lib" / "libmpi.so.40")
    environment(job)
    message = wrong_mpiexec(1)
    assert message is not None
    assert message.startswith(f"{name} started {count} processes") and f"{tmp_path}/bin/mpiexec" in message


def test_a_launcher_of_pmix_alone_is_told_by_every_rank_but_the_first(environment, monkeypatch):
    monkeypatch.setenv("PMIX_RANK", "3")
    assert "PMIx started this process as rank 3, and MPI sees a job of 1" in str(wrong_mpiexec(1))
    assert wrong_mpiexec(4) is None
    monkeypatch.setenv("PMIX_RANK", "0")
    assert wrong_mpiexec(1) is None


def test_the_launcher_of_mvapich(environment, monkeypatch):
    for name, value in {"RANK": "1", "SIZE": "6", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(f"MV2_COMM_WORLD_{name}", value)
    assert str(wrong_mpiexec(1)).startswith("MVAPICH mpirun_rsh started 6 processes")


def test_srun_without_mpi_is_told_of_its_flag(environment):
    environment(SRUN)
    assert "srun --mpi=pmix" in str(wrong_mpiexec(1))


@pytest.mark.parametrize(("local", "given", "chosen"), [("2", None, "3"), ("2", "1", "1"), ("4", None, None)])
def test_sums_go_by_halving_and_doubling_between_hosts_unless_the_user_says_otherwise(local, given, chosen):
    name = "OMPI_MCA_coll_libnbc_iallreduce_algorithm"
    job = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": local}
    environ = job | ({name: given} if given else {})
    detect._choose_sums(environ)
    assert environ.get(name) == chosen


@pytest.mark.fault(14)
def test_start_mpi_refuses_the_launcher_of_another_mpi(environment):
    """In a process of its own, since it starts MPI: N worlds of one rank, or what another MPI's mpiexec sets."""
    pytest.importorskip("mpi4py")
    script = "from hpcmp.comm.detect import start_mpi; print(start_mpi().COMM_WORLD.size)"

    def start(job: dict[str, str]) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-W", "ignore", "-c", script]
        return subprocess.run(argv, env=os.environ | job, capture_output=True, text=True, timeout=60)

    assert start({}).stdout == "1\n"
    errors = []
    for job, name, count in ((OPEN_MPI, "Open MPI", 8), (HYDRA, "MPICH Hydra", 2)):
        done = start(job)
        assert done.returncode != 0 and f"InputError: {name} started {count} processes" in done.stderr
        errors.append(done.stderr)
    assert sum("and they use" in error for error in errors) == 1  # the one that is not this MPI's own launcher


@pytest.mark.parametrize(
    ("job", "vendor", "wrong"),
    [
        (OPEN_MPI, "MPICH", True),
        (OPEN_MPI, "Open MPI", False),
        (OPEN_MPI, "Spectrum MPI", False),
        (HYDRA, "Open MPI", True),
        (HYDRA, "MPICH", False),
        (HYDRA, "Intel MPI", False),
        (SRUN, "MPICH", False),
        ({}, "MPICH", False),
    ],
)
def test_another_mpi_is_seen_before_it_starts(environment, job, vendor, wrong):
    environment(job)
    message = detect._other_mpi(vendor)
    assert (message is not None) is wrong
    assert not wrong or vendor in str(message)


class FakeInfo(dict[str, str]):
    def Get(self, key: str) -> str | None:
        return self.get(key)

    def Free(self) -> None:
        pass


def fake_mpi(version: str = "Open MPI v5", **info: str) -> SimpleNamespace:
    world = SimpleNamespace(Get_info=lambda: FakeInfo(info))
    return SimpleNamespace(COMM_WORLD=world, Get_library_version=lambda: version)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """library(body, load=True) compiles the C functions of an MPI library, and loads it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    import ctypes

    def build(body: str, load: bool = True) -> Path:
        folder = tmp_path_factory.mktemp("lib")
        (folder / "mpi.c").write_text(body)
        path: Path = folder / "libmpi.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", path, folder / "mpi.c"], check=True, timeout=60)
        if load:
            ctypes.CDLL(str(path))
        return path

    return build


@pytest.mark.parametrize(
    ("kinds", "aware"),
    [("mpi,system", False), ("system,cuda:device,mpi", True), ("cuda", True), ("cudaesque", False)],
)
def test_the_memory_kinds_of_mpi_4_1_decide(environment, monkeypatch, kinds, aware):
    monkeypatch.setattr(detect, "mpi_library", lambda: None)
    assert detect.cuda_aware(fake_mpi(mpi_memory_alloc_kinds=kinds)) is aware


@pytest.mark.parametrize("answer", [0, 1])
def test_the_library_is_asked(environment, monkeypatch, library, answer):
    path = library(f"int MPIX_Query_cuda_support(void) {{ return {answer}; }}")
    monkeypatch.setattr(detect, "mpi_library", lambda: path)
    assert detect.cuda_aware(fake_mpi()) is bool(answer)


def test_a_library_that_cannot_be_asked_is_not_aware(environment, monkeypatch, library):
    path = library("int MPI_Init(void) { return 0; }")
    monkeypatch.setattr(detect, "mpi_library", lambda: path)
    assert detect.cuda_aware(fake_mpi()) is False
    aside = library("int MPIX_Query_cuda_support(void) { return 1; }", load=False)  # another MPI than the one in use
    monkeypatch.setattr(detect, "mpi_library", lambda: aside)
    assert detect.cuda_aware(fake_mpi()) is False


def test_cray_is_aware_when_its_support_is_switched_on(environment, monkeypatch, library):
    path = library(
        "int MPIX_Query_cuda_support(void) { return 1; }"
        "int MPIX_GPU_query_support(int kind, int *yes) { *yes = kind == 0; return 0; }"
    )
    monkeypatch.setattr(detect, "mpi_library", lambda: path)
    cray = fake_mpi("MPI VERSION    : CRAY MPICH version 8.1.28.15 (ANL base 3.4a2)")
    assert detect.cuda_aware(cray) is False
    environment({"MPICH_GPU_SUPPORT_ENABLED": "1"})
    assert detect.cuda_aware(cray) is True


def test_the_word_of_the_user_decides(environment):
    yes, no = fake_mpi(mpi_memory_alloc_kinds="cuda"), fake_mpi(mpi_memory_alloc_kinds="system")
    assert detect.cuda_aware(no, "yes") is True and detect.cuda_aware(yes, "no") is False
    environment({"HPCMP_CUDA_AWARE": "no"})
    assert detect.cuda_aware(yes) is False and detect.cuda_aware(yes, "yes") is True
    environment({"HPCMP_CUDA_AWARE": "perhaps"})
    with pytest.raises(InputError, match="HPCMP_CUDA_AWARE=perhaps"):
        detect.cuda_aware(yes)


@pytest.mark.mpi
def test_the_mpi_in_use_is_found_and_asked(world):
    from mpi4py import MPI

    path = detect.mpi_library()
    if path is not None:  # elsewhere than Linux there is no list of loaded libraries
        assert path.exists() and path.name.startswith("libmpi")
    assert isinstance(detect.cuda_aware(MPI), bool)
    assert detect.start_mpi() is MPI
    assert wrong_mpiexec(world.size) is None
    if world.size > 1:
        started = launcher()
        assert started is not None and (started.rank, started.size) == (world.rank, world.size)


def shares(*cores: set[int], threads: int) -> list[Share]:
    return [Share(frozenset(c), threads) for c in cores]


def test_threads_beyond_the_cores_are_warned_of():
    message = oversubscription(2, shares({0, 1, 2, 3}, {0, 1, 2, 3}, threads=4))
    assert message == "8 threads of 2 ranks share 4 cores: set OMP_NUM_THREADS=2"
    message = oversubscription(3, shares({0, 1}, {0, 1}, {0, 1}, threads=1))
    assert message == "3 threads of 3 ranks share 2 cores: start at most 2 ranks"
    assert oversubscription(1, shares({0, 1}, threads=4)) is not None


def test_threads_within_the_cores_are_not():
    assert oversubscription(2, shares({0, 1, 2, 3}, {0, 1, 2, 3}, threads=2)) is None
    assert oversubscription(2, shares({0, 1}, {2, 3}, threads=2)) is None


def test_one_rank_alone_judges_by_its_own_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(detect, "share", lambda: Share(frozenset({0, 1}), 2))
    assert oversubscription(4) is None  # bound to 2 cores each, of 8
    assert oversubscription(5) is not None
    monkeypatch.setattr(detect, "share", lambda: Share(frozenset({0, 1}), 3))
    assert oversubscription(1) is not None


def test_detection_imports_neither_mpi_nor_numpy():
    script = "import sys, hpcmp.comm.detect; print(sorted({'mpi4py', 'numpy', 'cupy', 'h5py'} & set(sys.modules)))"
    argv = [sys.executable, "-c", script]
    assert subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout == "[]\n"
