"""The commands as a user starts them: what comes out, and one line for each kind of bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import gpu_present
from tests.corpus import config, corpus

HPCMP = [sys.executable, "-m", "hpcmp"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The run directory of a short serial run."""
    folder = tmp_path_factory.mktemp("trained")
    done = hpcmp("train", config(folder, data), "--json")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes whose kernels are not what the test is about have those that load at once."""
    monkeypatch.setenv("HPCMP_KERNELS", "reference")


def hpcmp(*argv: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*HPCMP, *map(str, argv)], capture_output=True, text=True, timeout=timeout)


def one_line(done: Any, code: int = 2) -> str:
    """The one line of an error, of a run that changed nothing else."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("hpcmp: error:")]
    assert done.returncode == code, done.stderr
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


def test_train_resumes_and_prints_one_json_object(tmp_path: Path, data: Path) -> None:
    toml = config(tmp_path, data)
    first = hpcmp("train", toml, "train.steps=4", "--json")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["step"] == 4
    again = hpcmp("train", toml)
    assert again.returncode == 0 and "resumed from" in again.stderr and "step 6 of 6" in again.stdout
    assert (tmp_path / "run" / "config.toml").exists()
    nothing = hpcmp("train", toml, "--json")
    assert nothing.returncode == 0 and json.loads(nothing.stdout)["loss"] is None  # no step was left to take


def test_train_on_ranks_draws_the_loss(tmp_path: Path, data: Path, run_mpi: Callable[..., Any]) -> None:
    pytest.importorskip("matplotlib")
    done = run_mpi(
        2, [*HPCMP, "train", str(config(tmp_path, data)), "layout.tp=2", "run.plot=true", "run.log_seconds=0"]
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    line = next(line for line in done.stderr.splitlines() if line.startswith("step 3/6"))
    for word in ("loss", "norm", "tokens/s", "% of peak", "ETA"):
        assert word in line


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_stops_with_75(tmp_path: Path, data: Path, number: signal.Signals) -> None:
    toml = config(tmp_path, data)
    process = subprocess.Popen(
        [*HPCMP, "train", str(toml), "train.steps=1000000", "--json"], stdout=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 75
    summary = json.loads(out)
    assert summary["reason"] == f"received {number.name}" and Path(summary["checkpoint"]).is_dir()


@pytest.mark.usefixtures("fast")
def test_minutes_stop_the_run_with_75(tmp_path: Path, data: Path) -> None:
    done = hpcmp("train", config(tmp_path, data), "train.steps=1000000", "train.minutes=0.01", "--json")
    assert done.returncode == 75, done.stderr
    assert "train.minutes" in json.loads(done.stdout)["reason"]


@pytest.mark.usefixtures("fast")
def test_verify_says_equal(tmp_path: Path, data: Path, run_mpi: Callable[..., Any]) -> None:
    argv = [*HPCMP, "verify", str(config(tmp_path, data)), "--layout", "tp=2", "--layout", "pp=2,schedule=zb-h1"]
    done = run_mpi(2, argv)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": equal: worst") == 2 and "blocks/2/mlp/down/weight" in done.stdout
    strict = run_mpi(2, [*argv, "--tolerance", "1e-30", "--json"])
    assert strict.returncode == 1, strict.stderr
    report = json.loads(next(line for line in strict.stdout.splitlines() if line.startswith("{")))
    assert not report["equal"] and 0 < report["layouts"][0]["worst"] < 1e-10


def test_verify_needs_no_data(tmp_path: Path) -> None:
    toml = tmp_path / "plain.toml"
    toml.write_text("[model]\nlayers = 1\nhidden = 8\nheads = 2\nsequence = 6\nvocabulary = 11\n[train]\nbatch = 2\n")
    done = hpcmp("verify", toml, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["layouts"][0]["worst"] < 1e-12


def test_verify_says_how_many_ranks_it_needs(tmp_path: Path, data: Path) -> None:
    error = one_line(hpcmp("verify", config(tmp_path, data), "--layout", "tp=2,pp=2"))
    assert "needs 4 ranks, and there are 1" in error


@pytest.mark.usefixtures("fast")
def test_generate_gives_the_same_text_on_any_number_of_ranks(trained: Path, run_mpi: Callable[..., Any]) -> None:
    argv = ["generate", str(trained / "checkpoints"), "--prompt", "def f", "--tokens", "40", "--json"]
    alone = json.loads(hpcmp(*argv).stdout)
    assert alone["tokens"] > 5
    for ranks in (2, 3):
        done = run_mpi(ranks, [*HPCMP, *argv])
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["text"] == alone["text"]
    other = json.loads(hpcmp(*argv, "--seed", "1").stdout)
    assert other["text"] != alone["text"]
    greedy = [json.loads(hpcmp(*argv, "--temperature", "0", "--seed", seed).stdout)["text"] for seed in "12"]
    assert greedy[0] == greedy[1]


BAD = {
    "unknown key": (["train.stepz=3"], "train.stepz"),
    "unknown section": (["trian.steps=3"], "train"),
    "wrong type": (["train.steps=many"], "train.steps"),
    "impossible layout": (["layout.tp=3", "layout.dp=1"], "1 rank"),
    "no data": (["data.path=nowhere.h5"], "nowhere.h5"),
    "data of another kind": (["data.path={toml}"], "tiny.toml"),
    "damaged data": (["data.path={cut}"], "cut.h5"),
    "small vocabulary": (["model.vocabulary=100"], "model.vocabulary"),
    "run directory is a file": (["run.directory={toml}"], "run.directory"),
    "unwritable folder": (["run.directory=/proc/nowhere"], "run.directory"),
    "sequence too long for the data": (["model.sequence=1000000"], "tokens.h5"),
    "wrong checkpoint": (["checkpoint.directory={wrong}"], "step_00000003"),
    "device that is not there": (["train.device=cuda"], "train.device"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_exit_2(case: str, tmp_path: Path, data: Path) -> None:
    overrides, named = BAD[case]
    toml = config(tmp_path, data)
    cut = tmp_path / "cut.h5"
    cut.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    wrong = tmp_path / "wrong"
    (wrong / "step_00000003").mkdir(parents=True)
    (wrong / "step_00000003" / "manifest.json").write_text("{}")
    before = toml.read_bytes()
    given = [o.format(toml=toml, cut=cut, wrong=wrong) for o in overrides]
    if case == "device that is not there" and gpu_present():
        pytest.skip("it is there")
    assert named in one_line(hpcmp("train", toml, *given))
    assert toml.read_bytes() == before


def test_bad_input_on_ranks_gets_one_line(tmp_path: Path, data: Path, run_mpi: Callable[..., Any]) -> None:
    done = run_mpi(2, [*HPCMP, "train", str(config(tmp_path, data)), "layout.tp=3"])
    assert "tp=2" in one_line(done)  # and says what would fit


@pytest.mark.parametrize(
    "argv", [["--tokens", "0"], ["--temperature", "-1"], ["--top-p", "2"], ["--top-k", "0"]], ids=lambda a: a[0]
)
def test_bad_flags_of_generate(argv: list[str], trained: Path) -> None:
    assert argv[0] in one_line(hpcmp("generate", trained / "checkpoints", *argv))


def test_generate_from_what_is_no_checkpoint(tmp_path: Path) -> None:
    assert str(tmp_path) in one_line(hpcmp("generate", tmp_path))


@pytest.mark.parametrize("command", ["train", "verify", "generate", "data", "checkpoint", "doctor", "data prepare"])
def test_help_teaches(command: str) -> None:
    done = hpcmp(*command.split(), "--help")
    assert done.returncode == 0 and len(done.stdout.splitlines()) > 8
