"""What a run writes down of each of its starts, and of each rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from hpcmp import __version__
from hpcmp.kernels.cuda import libraries
from hpcmp.training.config import load_config
from hpcmp.training.records import read_records
from hpcmp.training.toml import read_toml
from hpcmp.training.trainer import Trainer
from hpcmp.training.versions import git_commit, versions
from tests.corpus import config, corpus

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


@pytest.mark.mpi(size=1)
@pytest.mark.mpi(size=3)
def test_each_start_is_a_record_and_each_rank_has_its_log(
    world: Intracomm, mpi_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "LSB_JOBID", "PBS_JOBID", "FLUX_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PBS_JOBID", "4711.server")
    monkeypatch.setenv("LOADEDMODULES", "gcc/13:openmpi/5")
    if world.rank == 0:
        config(mpi_tmp_path, corpus(mpi_tmp_path))
    world.Barrier()
    for steps in (2, 3):
        given = [f"train.steps={steps}", "run.rank_logs=true", "run.log_seconds=0", "train.seed=5"]
        with Trainer(load_config(mpi_tmp_path / "tiny.toml", given), world) as trainer:
            trainer.train()
    world.Barrier()
    if world.rank:
        return
    run = mpi_tmp_path / "run"
    (first, end, second, last), damaged = read_records(run / "manifest.jsonl")
    assert [first["step"], second["step"]] == [0, 2] and not damaged
    assert [(each["step"], each["reason"], each["requeued"]) for each in (end, last)] == [
        *((steps, "finished", False) for steps in (2, 3))
    ]
    assert first["time"] <= end["ended"] <= second["time"] <= last["ended"]
    assert first["run"] == second["run"] and first["seed"] == 5 and first["modules"] == ["gcc/13", "openmpi/5"]
    assert (first["job"]["scheduler"], first["job"]["id"]) == ("PBS", "4711.server")
    assert first["code"]["hpcmp"].startswith(f"{__version__}, sources ") and first["layout"]["dp"] == world.size
    assert {"Python", "NumPy", "h5py", "HDF5", "mpi4py", "MPI", "CuPy"} <= first["versions"].keys()
    assert len(first["ranks"]) == world.size and first["ranks"][0]["pid"] == os.getpid()
    assert first["ranks"][0]["cores"] == sorted(os.sched_getaffinity(0)) and len(first["hosts"]) == 1
    assert first["data"]["train"] == trainer.inputs.sampler.digest and first["data"]["tokens"] > 0
    assert read_toml(run / "config.toml")["train"]["seed"] == 5
    logs = sorted(path.name for path in (run / "logs").iterdir())
    assert logs == [f"rank_{rank:05d}.log" for rank in range(world.size)]
    for rank, name in enumerate(logs):
        text = (run / "logs" / name).read_text()
        assert text.count(f"DEBUG rank {rank} on ") == 2 and text.count("DEBUG step ") == 3, text


def test_the_commit_is_read_without_git(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert git_commit(tmp_path) is None
    try:
        git("init", "-q")
    except FileNotFoundError:
        pytest.skip("no git")
    assert git_commit(tmp_path) is None  # nothing is committed
    git("commit", "-q", "--allow-empty", "-m", "one")
    commit = git("rev-parse", "HEAD").strip()
    (tmp_path / "inner").mkdir()
    assert git_commit(tmp_path / "inner") == commit
    git("pack-refs", "--all")
    assert git_commit(tmp_path) == commit
    git("worktree", "add", "-q", "inner/tree", "-b", "other")
    assert git_commit(tmp_path / "inner" / "tree") == commit
    git("checkout", "-q", "--detach")
    assert git_commit(tmp_path) == commit
    (tmp_path / ".git" / "HEAD").write_bytes(b"\xff\xfe")
    assert git_commit(tmp_path) is None


def test_versions_do_not_need_mpi() -> None:
    found = versions(None)
    assert "MPI" not in found and found["hpcmp"] == __version__


def test_versions_of_what_a_gpu_computes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for CuPy; nothing is loaded where there is no GPU."""
    runtime = SimpleNamespace(getDeviceCount=lambda: 1, runtimeGetVersion=lambda: 13000, driverGetVersion=lambda: 13010)
    cuda = SimpleNamespace(runtime=runtime, nvrtc=SimpleNamespace(getVersion=lambda: (13, 2)))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(__version__="14.2.0", cuda=cuda))
    monkeypatch.setitem(sys.modules, "cupy.cuda.nccl", SimpleNamespace(get_version=lambda: 23003))
    monkeypatch.setattr(libraries, "cublaslt", lambda: libraries.Library("13.1.2 (nvmath-python 1.0.0)"))
    monkeypatch.setattr(libraries, "cudnn", lambda: libraries.Library(why="No module named 'cudnn'"))
    expected = {
        "CuPy": "14.2.0",
        "CUDA runtime": "13.0",
        "CUDA driver": "13.1",
        "NCCL": "2.30.3",
        "NVRTC": "13.2",
        "cuBLASLt": "13.1.2 (nvmath-python 1.0.0)",
        "cuDNN": "not found (No module named 'cudnn')",
    }
    assert versions(None).items() >= expected.items()
    runtime.getDeviceCount = lambda: 0
    assert not {"NVRTC", "cuBLASLt", "cuDNN"} & versions(None).keys()
