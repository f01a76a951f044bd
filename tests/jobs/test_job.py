"""Jobs and site files that are refused, before anything is written: times, ranks that fit no layout, unknown keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpcmp.errors import InputError
from hpcmp.jobs import Job, Site, load_site, make_job
from hpcmp.jobs.job import duration


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt.toml in the current directory, whose layout needs a multiple of 4 ranks."""
    monkeypatch.chdir(tmp_path)
    Path("gpt.toml").write_text("[model]\nlayers = 4\nheads = 8\n[layout]\ntp = 2\npp = 2\n")


def job(**more: Any) -> Job:
    settings = {"nodes": 1 if more["scheduler"] == "none" else 3, "ranks_per_node": 4, "time": "2:00:00"} | more
    return make_job("gpt.toml", **settings)


@pytest.mark.parametrize("text, seconds", [("30", 1800), ("2:00:00", 7200), ("1-00:00:00", 86400), ("0:05:30", 330)])
def test_times(text: str, seconds: int) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5", "2:00", "1:60:00", "1-24:00:00", "2h", "1.5", "٣"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(InputError, match="--time"):
        duration(text)


@pytest.mark.parametrize(
    "scheduler, more, message",
    [
        ("slurm", {"ranks_per_node": 3}, "does not divide the 9 ranks; tp=3,pp=3 or"),
        ("slurm", {"time": None}, "--time"),
        ("slurm", {"time": "1"}, "warning before the end"),
        ("slurm", {"nodes": 0}, "at least 1"),
        ("slurm", {"array": "train.seed=1"}, "an array has two or more"),
        ("slurm", {"array": "train.seed=1,x"}, "train.seed: expected an integer"),
        ("slurm", {"array": "layout.tp=2,5"}, "run 2 of the array"),
        ("slurm", {"array": "nosuchfile"}, "no file of overrides"),
        ("none", {"nodes": 2}, "this machine alone"),
        (None, {}, "--scheduler"),
    ],
)
def test_what_cannot_be_is_refused(scheduler: str | None, more: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        job(**more, scheduler=scheduler)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[lunch]\nmpi = 'x'", "did you mean [launch]?"),
        ("[batch]\nacount = 'x'", "did you mean batch.account?"),
        ('[batch]\naccount = "x\\n#SBATCH --uid=0"', "batch.account: expected one line"),
        ("[environment]\n'A B' = 1", "not the name of a variable"),
        ("[environment]\nA = [1]", "environment.A"),
        ("[launch]\nlauncher = 'ssh'", "launch.launcher"),
    ],
)
def test_a_site_file_is_checked(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "site.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_site(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_a_launcher_of_another_scheduler_is_refused() -> None:
    Path("site.toml").write_text('launch.launcher = "srun"')
    with pytest.raises(InputError, match="does not start ranks"):
        job(scheduler="pbs", site=load_site("site.toml"))
    assert load_site("site.toml") != Site()
