"""``hpcmp job`` as a user starts it, among schedulers that are not there; and the scripts in jobs/."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcmp.cli import main
from hpcmp.jobs.script import HEADER
from hpcmp.jobs.site import reference
from tests.batch.fakes import Programs

ROOT = Path(__file__).resolve().parents[2]
READY = sorted((ROOT / "jobs").glob("*.sbatch"))
JOB = ["job", "gpt.toml", "--ranks-per-node", "2", "--time", "2:00:00"]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """The schedulers; the current directory has a configuration, gpt.toml."""
    monkeypatch.chdir(tmp_path)
    Path("gpt.toml").write_text("[layout]\ntp = 2\n")
    programs = Programs(tmp_path / "bin")
    programs.add("sbatch", f'n=$(wc -l <"{tmp_path}/bin/calls"); echo "10$n;box"')
    programs.add("qsub", "echo 7.server")
    programs.add("bsub", f'cat >"{tmp_path}/stdin"; echo "Job <55> is submitted to queue <normal>."')
    programs.add("flux", "echo ƒ2S")
    monkeypatch.setenv("PATH", programs.path)
    return programs


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """The result of ``hpcmp job ... --json``, which must go well."""
    assert main([*JOB, "--json", *words]) == 0, capsys.readouterr().err
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_a_script_is_written(programs: Programs, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "--scheduler=slurm", "--nodes=2", "train.seed=3")  # an override after the options
    assert result == {"script": "gpt.sbatch", "ids": [], "nodes": 2, "ranks": 4, "runs": 1, "exit_code": 0}
    text = Path("gpt.sbatch").read_text()
    assert "train.seed=3" in text and text.count(HEADER) == 1
    run(capsys, "--scheduler=slurm", "--nodes=2", "--", "train.seed=3")
    assert Path("gpt.sbatch").read_text() == text
    assert Path("gpt.sbatch").stat().st_mode & 0o111
    assert programs.calls == []
    assert main([*JOB, "--scheduler=slurm", "--out=-"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n#SBATCH")


def test_a_file_of_somebody_else_is_left_alone(programs: Programs, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "--scheduler=slurm")
    run(capsys, "--scheduler=slurm")  # its own is written again
    assert main([*JOB, "--scheduler=slurm", "--out=gpt.toml"]) == 2
    assert "has not written" in capsys.readouterr().err
    assert Path("gpt.toml").read_text() == "[layout]\ntp = 2\n"


@pytest.mark.parametrize(
    "scheduler, ids, calls",
    [
        (
            "slurm",
            ["101", "102"],
            [
                ["sbatch", "--parsable", "gpt.sbatch"],
                ["sbatch", "--parsable", "--dependency=afterany:101", "gpt.sbatch"],
            ],
        ),
        ("pbs", ["7.server"] * 2, [["qsub", "gpt.pbs"], ["qsub", "-W", "depend=afterany:7.server", "gpt.pbs"]]),
        ("lsf", ["55", "55"], [["bsub"], ["bsub", "-w", "ended(55)"]]),
        (
            "flux",
            ["ƒ2S"] * 2,
            [["flux", "batch", "gpt.flux"], ["flux", "batch", "--dependency=afterany:ƒ2S", "gpt.flux"]],
        ),
    ],
)
def test_a_chain_is_submitted(
    programs: Programs, capsys: pytest.CaptureFixture[str], scheduler: str, ids: list[str], calls: list[list[str]]
) -> None:
    result = run(capsys, f"--scheduler={scheduler}", "--submit", "--chain=2")
    assert result["ids"] == ids
    assert programs.calls == calls
    if scheduler == "lsf":
        assert Path("stdin").read_text() == Path("gpt.lsf").read_text()


def test_submit_prints_the_id(programs: Programs, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*JOB, "--scheduler=slurm", "--submit"]) == 0
    assert capsys.readouterr().out == "101\n"


def test_an_array_of_flux_is_a_job_a_run(programs: Programs, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "--scheduler=flux", "--submit", "--array=train.seed=1,2")
    assert len(result["ids"]) == 2 and result["runs"] == 2
    assert programs.calls == [["flux", "batch", "gpt.flux", "1"], ["flux", "batch", "gpt.flux", "2"]]


def test_what_the_scheduler_says_is_the_error(programs: Programs, capsys: pytest.CaptureFixture[str]) -> None:
    programs.add("sbatch", 'case "$*" in *afterany*) echo "no such partition" >&2; exit 1 ;; esac; echo 9')
    assert main([*JOB, "--scheduler=slurm", "--submit", "--chain=3"]) == 2
    said = capsys.readouterr().err
    assert "no such partition" in said and "submitted: 9" in said and said.count("\n") == 1


def test_nothing_is_written_or_submitted_that_does_not_fit(
    programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("here.toml").write_text('batch.scheduler = "none"')
    for words in (
        ["--scheduler=slurm", "--ranks-per-node=3"],
        ["--scheduler=slurm", "layout.tp=3"],
        ["--scheduler=none", "--submit"],
        ["--site=here.toml"],
        ["--scheduler=slurm", "--chain=0"],
        ["--scheduler=slurm", "--site=nowhere.toml"],
        ["--scheduler=slurm", "--noodles=2"],
        ["--scheduler=slurm", "trainseed"],
    ):
        assert main([*JOB, "--submit", *words]) == 2, words
        assert capsys.readouterr().err.count("\n") == 1
    assert programs.calls == [] and not list(Path.cwd().glob("gpt.s*"))


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of jobs/, which is the current directory."""
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", READY, ids=lambda path: path.name)
def test_the_scripts_in_jobs_are_what_the_command_writes(repository: Path, path: Path) -> None:
    """Write them again: the line of each after "Written by:", in the repository's root."""
    text = path.read_text()
    (line,) = [line for line in text.splitlines() if line.startswith(HEADER)]
    mine = repository / "jobs" / path.name
    mine.unlink()
    assert main(["job", *shlex.split(line.removeprefix(HEADER))]) == 0
    assert mine.read_text() == text
    assert subprocess.run(["bash", "-n", mine]).returncode == 0


def test_the_keys_of_a_site_file_are_in_the_docs() -> None:
    page = (ROOT / "docs" / "jobs.md").read_text()
    assert page.partition(" -->\n")[2].strip() == reference().strip()


def test_there_are_scripts_in_jobs() -> None:
    assert {path.stem for path in READY} >= {"gpt", "sweep"}


def study(repository: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """The table of jobs/scaling.sh."""
    programs = Programs(repository / f"bin{len(list(repository.glob('bin*')))}")
    programs.add("sbatch", "echo 1")
    programs.add("hpcmp", f'exec "{sys.executable}" -m hpcmp "$@"')
    programs.add("python", f'exec "{sys.executable}" "$@"')
    monkeypatch.setenv("PATH", programs.path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run(["bash", "jobs/scaling.sh", *words], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "error" not in done.stderr and "failed" not in done.stderr, done.stderr
    return done.stdout


def test_a_study_of_scaling_is_a_job_for_each_number_of_nodes(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["jobs/gpt.toml", "jobs/sites/gpu-cluster.toml", "4", "layout.tp=2"]
    told = study(repository, monkeypatch, *words)
    runs = [f"runs/scaling/{run}" for run in ("strong-1", "strong-2", "strong-4", "weak-2", "weak-4")]
    assert sorted(map(str, Path("runs/scaling").glob("*.sh"))) == [f"{run}.sh" for run in runs]
    assert "train.batch=512 " in Path("runs/scaling/strong-4.sh").read_text()
    text = Path("runs/scaling/weak-4.sh").read_text()
    assert "layout.tp=2" in text and "train.batch=2048 " in text and "#SBATCH --nodes=4" in text
    assert told.count("not finished") == 6
    calls = Path("bin0/calls").read_text()
    assert [line.split("\t")[-1] for line in calls.splitlines() if line.startswith("sbatch")] == [
        f"{r}.sh" for r in runs
    ]


@pytest.mark.timeout(120)
def test_a_study_of_scaling_runs_here_without_a_scheduler(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("c.txt").write_text("all work and no play\n" * 200)
    assert main(["data", "prepare", "c.txt", "--output", "c.h5"]) == 0
    Path("c.toml").write_text('[model]\nlayers = 1\nhidden = 8\nheads = 2\nsequence = 8\n[data]\npath = "c.h5"\n')
    Path("here.toml").write_text('batch.scheduler = "none"\nlaunch.bind = "none"')
    given = ["train.steps=3", "optimizer.warmup=0", "train.batch=4", "train.kernels=reference"]
    words = ["c.toml", "here.toml", "2", *given]
    rows = [line.split() for line in study(repository, monkeypatch, *words).splitlines()]
    assert rows[0] == ["ranks", "batch", "s/step", "tokens/s", "efficiency"]
    assert [row[:3] for row in rows[1:]] == [
        ["strong", "1", "4"],
        ["strong", "2", "4"],
        ["weak", "1", "4"],
        ["weak", "2", "8"],
    ]
    for kind in rows[1:3], rows[3:5]:
        assert kind[0][5] == "100%"
        rates = [float(row[4].replace(",", "")) for row in kind]
        assert float(kind[1][5][:-1]) == pytest.approx(100 * rates[1] / rates[0] / 2, abs=1)
    assert [line.split() for line in study(repository, monkeypatch, *words).splitlines()] == rows, "nothing runs twice"


@pytest.mark.parametrize("site", sorted((ROOT / "jobs" / "sites").glob("*.toml")), ids=lambda path: path.stem)
def test_the_sites_in_jobs_can_be_used(repository: Path, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["job", "jobs/quickstart.toml", "--site", str(site), "--time=60", "--out=-"]) == 0
    assert "quickstart.toml" in capsys.readouterr().out
