"""Faults of a job as its user meets them: ``mpirun hpcmp train`` ends in seconds with its exit code, and says why."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from hpcmp.checkpoint import checkpoints
from hpcmp.training.diagnosis import diagnose
from hpcmp.training.dumps import FOLDER, read_alive
from hpcmp.training.records import read_records
from tests.corpus import config, corpus
from tests.harness.launch import ROOT

pytestmark = pytest.mark.timeout(120)
SECONDS = 100  # that a job may take on a busy machine


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return corpus(tmp_path_factory.mktemp("corpus")).read_bytes()


Train = Callable[..., CompletedProcess[str]]


@pytest.fixture
def train(tmp_path: Path, data: bytes, run_mpi: Callable[..., CompletedProcess[str]]) -> Train:
    """train(how, override, ...): the job with that fault (``faulty.py``), in ``tmp_path / "run"``."""
    (tmp_path / "tokens.h5").write_bytes(data)
    toml = config(tmp_path, tmp_path / "tokens.h5")

    def train(how: str, *overrides: str, ranks: int = 2) -> CompletedProcess[str]:
        argv = [sys.executable, "-m", "tests.training.faulty", how, str(toml), "train.kernels=reference", *overrides]
        return run_mpi(ranks, argv, timeout=SECONDS, env={"PYTHONPATH": str(ROOT)})

    return train


def said(done: CompletedProcess[str], code: int) -> str:
    """The only error of a job that has ended with ``code``."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("hpcmp: error: ")]
    assert done.returncode == code and len(errors) == 1, done.stderr
    return errors[0].removeprefix("hpcmp: error: ")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return read_records(folder / "run" / "metrics.jsonl")[0]


@pytest.mark.fault(10)
def test_a_rank_that_is_killed_ends_the_job(train: Train, tmp_path: Path) -> None:
    """At once, by the hand of mpirun. Open MPI's says which process it was, whose file says which rank; MPICH's says
    that one was killed, and often the number of another one that it has killed itself."""
    done = train("killed")
    owner = dict(read_alive(tmp_path / "run" / FOLDER))[1].owner
    named = owner is not None and f"PID {owner.pid} " in done.stderr
    assert done.returncode == 137 and named or done.returncode == 9 and "Killed (signal 9)" in done.stdout, done


@pytest.mark.fault(10)
def test_a_rank_that_crashes_is_named(train: Train, tmp_path: Path) -> None:
    done = train("crashed")
    assert done.returncode not in (0, 69)
    verdict = diagnose(tmp_path / "run")[0]
    assert verdict.startswith("rank 1 has crashed: Fatal Python error: Segmentation fault, File ")
    assert " in crashed (" in verdict


@pytest.mark.fault(10)
def test_a_rank_without_memory_is_named(train: Train) -> None:
    done = train("memory")
    assert "MemoryError: Unable to allocate" in said(done, 70)
    assert "hpcmp: rank 1 of 2 on host " in done.stderr


@pytest.mark.fault(11)
def test_ranks_whose_collectives_differ_get_the_same_error(train: Train) -> None:
    error = said(train("dtype", "train.check_collectives=true"), 69)
    assert re.match(r"collective \d+ of [a-z_, ]+ differs between ranks: ranks? 0", error) and "(int32, 8) at " in error


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("train.seed=7", "train.seed is 0 on rank 0, 7 on rank 1"),
        ("layout.tp=2", "layout.tp is 1 on rank 0, 2 on rank 1"),
    ],
)
def test_settings_that_differ_between_ranks_are_refused(
    train: Train, tmp_path: Path, override: str, difference: str
) -> None:
    assert difference in said(train("none", f"last:{override}"), 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.fault(14)
def test_the_mpirun_of_another_mpi_is_refused(
    run_mpi: Callable[..., CompletedProcess[str]], tmp_path: Path, data: bytes
) -> None:
    other = os.environ.get("HPCMP_OTHER_MPIRUN")  # tests/run.sh names it
    if not other:
        pytest.skip(os.environ.get("HPCMP_MPICH_MISSING") or "no other MPI: `bash tests/run.sh` installs one")
    (tmp_path / "tokens.h5").write_bytes(data)
    argv = [sys.executable, "-m", "hpcmp", "train", str(config(tmp_path, tmp_path / "tokens.h5"))]
    done = run_mpi(2, argv, env={"PATH": f"{Path(other).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)})
    error = said(done, 2)
    assert re.match(r"(MPICH Hydra|Open MPI) started 2 processes, and they use (MPICH|Open MPI): start with ", error)
    assert f"{sys.prefix}/" in error and not (tmp_path / "run").exists()


@pytest.mark.fault(15)
def test_a_gradient_that_is_no_number_is_laid_to_its_rank(train: Train, tmp_path: Path) -> None:
    error = said(train("nan", "checkpoint.every=2"), 1)
    assert error.startswith("step 2: ") and "on rank 1 the gradient of " in error
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000002"]
    assert error.endswith("step_00000002")


@pytest.mark.fault(16)
def test_a_flipped_bit_of_a_weight_is_laid_to_its_rank(train: Train, tmp_path: Path) -> None:
    error = said(train("flipped", "train.replica_check=3", "checkpoint.every=3", ranks=3), 1)
    assert error.startswith("after step 3 copies differ: ") and "on rank 2 not as on the other" in error
    assert checkpoints(tmp_path / "run" / "checkpoints") == []


@pytest.mark.fault(17)
def test_a_slow_rank_is_named(train: Train, tmp_path: Path) -> None:
    done = train("slow", "run.log_seconds=0")
    assert done.returncode == 0, done.stderr
    assert re.search(r"rank 1 on .*compute takes", done.stderr)  # again, if it was not slow for a while: cores are busy
    looks = [record for record in metrics(tmp_path) if "phases" in record]
    assert looks[-1]["phases"]["compute"]["slowest"] == looks[-1]["phases"]["wait"]["fastest"] == 1


@pytest.mark.fault(18)
@pytest.mark.parametrize(("how", "signal"), [("terminated", "SIGTERM"), ("warned", "SIGUSR1")])
def test_a_signal_has_all_ranks_stop_with_a_checkpoint(train: Train, tmp_path: Path, how: str, signal: str) -> None:
    done = train(how, "train.steps=1000", "--json")
    assert done.returncode == 75, done.stderr
    summary = json.loads(done.stdout)
    assert summary["reason"] == f"received {signal}" and summary["step"] < 1000
    (saved,) = checkpoints(tmp_path / "run" / "checkpoints")
    assert str(saved) == summary["checkpoint"]


@pytest.mark.fault(18)
def test_a_second_signal_ends_a_job_that_waits_in_mpi(train: Train) -> None:
    """With that rank's code; 9 where MPICH's mpirun, which ends the others, takes one of these for the first."""
    assert train("twice").returncode in (128 + 12, 9)


@pytest.mark.fault(20)
def test_a_data_file_cut_short_is_refused(train: Train, tmp_path: Path) -> None:
    """Before it is read, and while it is."""
    error = said(train("cut", "train.steps=1000"), 2)
    assert re.match(rf"{tmp_path}/tokens.h5: train/tokens\[\d+:\d+\]: ", error)
    assert str(tmp_path / "tokens.h5") in said(train("none"), 2)


@pytest.mark.fault(23)
def test_metrics_that_cannot_be_written_end_nothing(train: Train, tmp_path: Path) -> None:
    done = train("full")
    assert done.returncode == 0 and "step 6 of 6" in done.stdout, done.stderr
    assert done.stderr.count("No space left on device") == 1
