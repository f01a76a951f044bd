"""Ranks that die: the others go on in their processes, wherever it happens, with the losses of the run to which nothing
happened."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from hpcmp.checkpoint.directory import checkpoints
from hpcmp.errors import InputError
from hpcmp.jobs.job import make_job
from hpcmp.jobs.script import script
from hpcmp.jobs.site import Site
from hpcmp.training.config import load_config
from hpcmp.training.records import read_records
from hpcmp.training.recovery import TRIES, LostError, Recovery, rearranged
from hpcmp.training.report import RECOVERIES, Run, report
from hpcmp.training.trainer import Trainer
from tests import corpus

Job = Callable[..., CompletedProcess[str]]
Train = Callable[..., CompletedProcess[str]]
pytestmark = pytest.mark.timeout(300)
ULFM = "--with-ft", "ulfm"
OVERRIDES = "train.steps=8", "checkpoint.every=2", "train.watchdog=60", "train.dtype=float64", "model.layers=3"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def train(run_mpi: Job, tmp_path: Path, data: Path) -> Train:
    """``train(ranks, where, overrides...)`` runs ``dying``; the run's directory is ``tmp_path / "run"``."""
    if "Open MPI v5" not in version(run_mpi):
        pytest.skip("no Open MPI 5")

    def run(ranks: int, where: str, *overrides: str, options: tuple[str, ...] = ULFM) -> CompletedProcess[str]:
        toml, root = corpus.config(tmp_path, data), str(Path(corpus.__file__).parents[1])
        argv = [*options, sys.executable, "-m", "tests.training.dying", where, "train", str(toml), *OVERRIDES]
        argv.append("train.kernels=reference")  # which load faster
        return run_mpi(ranks, [*argv, *overrides], timeout=240, env={"PYTHONPATH": root})

    return run


def version(run_mpi: Job, found: list[str] = []) -> str:  # noqa: B006 (asked once)
    if not found:
        program = "from mpi4py import MPI; print(MPI.Get_library_version())"
        found.append(run_mpi(1, [sys.executable, "-c", program]).stdout)
    return found[0]


def losses(folder: Path) -> list[float]:
    records, damaged = read_records(folder / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    assert not damaged and [record["step"] for record in steps] == list(range(8)), "a step is missing, or there twice"
    return [record["loss"] for record in steps]


def recoveries(folder: Path) -> list[dict[str, Any]]:
    return read_records(folder / RECOVERIES)[0]


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[float]:
    """The losses of the run on one rank."""
    folder = tmp_path_factory.mktemp("serial")
    with Trainer(load_config(corpus.config(folder, data), OVERRIDES)) as trainer:
        trainer.train()
    return losses(folder / "run")


PIPELINE = "train.recover=true", "layout.pp=3", "train.spares=1"


def test_spare_ranks_take_the_places_of_the_dead(train: Train, tmp_path: Path, serial: list[float]) -> None:
    """In a backward, while others wait for ranks that live; and rank 0 in a save: the layout, and all bits, remain."""
    assert train(3, "-", "layout.pp=3", "train.recover=true").returncode == 0
    undisturbed = losses(tmp_path / "run")
    assert undisturbed == pytest.approx(serial, rel=1e-12)
    (tmp_path / "run").rename(tmp_path / "undisturbed")
    done = train(5, "backward:2:3,manifest:0:2", *PIPELINE, "train.spares=2")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == undisturbed
    first, second = recoveries(tmp_path / "run")
    assert list(first["lost"]) == ["2"] and list(second["lost"]) == ["0"]
    assert [(r["ranks"], r["waiting"], r["step"], r["again"]) for r in (first, second)] == [(3, 1, 2, 1), (3, 0, 2, 2)]
    assert "finished: step 8 of 8" in done.stdout, "another rank than 0 says the result"
    assert "rank 2 on " in done.stdout and "step 8/8" in done.stderr
    assert len(report(Run(tmp_path / "run"))["recoveries"]) == 2


def test_without_revoking_it_hangs(train: Train) -> None:
    """The test above notices that: a rank waits for one that lives, and is gone to agree; its watchdog ends the job."""
    done = train(4, "deaf,backward:2:3", *PIPELINE, "train.watchdog=3")
    assert done.returncode == 69 and "on without" not in done.stdout


def test_fewer_replicas_go_on(train: Train, tmp_path: Path, serial: list[float]) -> None:
    """A rank dies in an evaluation, then two at once: dp=4, 3, 1; nothing of the former trainers stays in memory."""
    where = "evaluate:3:1,step:0:5,step:2:5"
    done = train(4, where, "train.recover=true", "run.evaluate_every=3", "checkpoint.asynchronous=true")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(serial, rel=1e-12)
    found = recoveries(tmp_path / "run")
    assert sorted(rank for each in found for rank in each["lost"]) == ["0", "2", "3"]
    assert found[0]["layout"].startswith("dp=3,") and found[-1]["layout"].startswith("dp=1,")
    assert "rank 1: 1 engines" in done.stderr


def test_a_rank_that_dies_at_the_very_end(train: Train, tmp_path: Path) -> None:
    done = train(3, "close:1:1", "train.recover=true", "train.steps=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished: step 2 of 2") == 1


def test_one_that_is_left_stops_in_order(train: Train, tmp_path: Path) -> None:
    """The launcher gives its exit code, not that of the rank that died of a segmentation fault."""
    done = train(2, "step:1:2+segfault,step:0:4+stop", "train.recover=true")
    assert done.returncode == 75, done.stderr
    assert checkpoints(tmp_path / "run" / "checkpoints")[0].name == "step_00000006"


def test_too_few_end_the_job_and_another_start_goes_on(train: Train, tmp_path: Path, serial: list[float]) -> None:
    done = train(2, "step:1:3", "train.recover=true", "layout.tp=2")
    assert done.returncode == 69
    assert re.search(r"error: rank 1 on \S+ is lost: dp=1,pp=1,tp=2,sp=1 does not fit the 1 ranks", done.stderr)
    assert train(2, "-", "train.recover=true", "layout.tp=2").returncode == 0
    assert losses(tmp_path / "run") == pytest.approx(serial, rel=1e-12)


@pytest.mark.parametrize(("how", "code", "said"), [("sleep", 69, "rank 1 has not joined"), ("raise", 70, "planted")])
def test_what_is_no_death_ends_the_job(train: Train, how: str, code: int, said: str) -> None:
    done = train(3, f"step:1:2+{how}", "train.recover=true", "train.watchdog=3")
    assert done.returncode == code and said in done.stderr
    assert "lost" not in done.stderr


def test_it_is_refused_where_mpi_would_end_the_job(train: Train) -> None:
    done = train(2, "-", "train.recover=true", options=())
    assert done.returncode == 2 and "mpirun --with-ft ulfm" in done.stderr


def test_a_program_of_its_own_is_not_left_unprotected(tmp_path: Path, data: Path) -> None:
    with pytest.raises(InputError, match=r"hpcmp\.Recovery"):
        Trainer(load_config(corpus.config(tmp_path, data), ["train.recover=true"]))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.device=cuda", 'train.device = "cuda"'),
        ("checkpoint.storage=mpio", 'checkpoint.storage = "mpio"'),
        ("communication.shared_memory=yes", 'communication.shared_memory = "yes"'),
    ],
)
def test_what_does_not_notice_a_death_is_refused(tmp_path: Path, data: Path, override: str, said: str) -> None:
    toml = corpus.config(tmp_path, data)
    assert load_config(toml, ["train.recover=true"]).resolved().communication.shared_memory == "no"
    with pytest.raises(InputError, match=re.escape(said)):
        load_config(toml, ["train.recover=true", override])
    with pytest.raises(InputError, match=r"train\.spares = 1"):
        load_config(toml, ["train.spares=1"])


def test_places_after_a_loss() -> None:
    hosts = {rank: f"node{rank // 4}" for rank in range(12)}
    ranks = list(range(12))
    assert rearranged(ranks, 8, 2, [3], hosts) == [0, 1, 2, 8, 4, 5, 6, 7, 9, 10, 11]
    assert rearranged(ranks, 10, 2, [3, 11], hosts) == [0, 1, 2, 10, 4, 5, 6, 7, 8, 9]
    assert rearranged([0, 1, 4, 5, 2, 6], 4, 2, [5], hosts) == [0, 1, 4, 6, 2], "the spare rank of its own host"
    assert rearranged(range(8), 8, 2, [3, 6], hosts) == [0, 1, 4, 5, 2, 7], "whole replicas stay as they are"
    assert rearranged(range(4), 4, 2, [], hosts) == [0, 1, 2, 3]


def test_the_layout_that_is_left(tmp_path: Path, data: Path) -> None:
    config = load_config(corpus.config(tmp_path, data), ["layout.tp=2", "layout.dp=3", "train.minutes=5"])
    recovery = Recovery(config, None)
    assert recovery._plan(6, 6)[1] == recovery._plan(7, 6)[1] == 6
    assert recovery._plan(5, 6)[1] == 4
    fewer = recovery._plan(3, 6)
    assert fewer[1] == 2 and fewer[0].resolved(ranks=2).layout.dp == 1
    assert fewer[0].train.minutes == pytest.approx(5, abs=0.5) and fewer[0].train.minutes < 5
    with pytest.raises(LostError, match="does not fit the 1 ranks"):
        recovery._plan(1, 6)
    recovery._tries = TRIES + 1
    with pytest.raises(LostError, match="without a step between"):
        recovery._plan(6, 6)
    shared = dataclasses.replace(config, layout=dataclasses.replace(config.layout, zero=1, zero_group=2, dp=4, tp=1))
    assert Recovery(shared, None)._plan(3, 4)[1] == 2, "zero_group = 2 does not cut 3 replicas"


def test_a_job_script_has_the_launcher_keep_the_others(tmp_path: Path, data: Path) -> None:
    toml, site = corpus.config(tmp_path, data), Site()
    mpirun = dataclasses.replace(site, launch=dataclasses.replace(site.launch, launcher="mpirun"))
    given: dict[str, Any] = {"scheduler": "slurm", "nodes": 2, "ranks_per_node": 3, "time": "30"}
    text = script(make_job(toml, ["train.recover=true"], **given, site=mpirun))
    assert "--with-ft ulfm" in text
    assert "--with-ft" not in script(make_job(toml, [], **given, site=mpirun))
    with pytest.raises(InputError, match="launch.launcher"):
        make_job(toml, ["train.recover=true"], **given, site=site)
    spared = make_job(toml, ["train.recover=true", "train.spares=2", "layout.tp=4"], **given, site=mpirun)
    assert spared.members[0].fitting == (2,)


def test_the_record_of_a_recovery_is_json(tmp_path: Path) -> None:
    (tmp_path / RECOVERIES).write_text(json.dumps({"lost": {"3": "node7"}, "step": 4, "again": "x"}) + "\ntorn")
    (tmp_path / "metrics.jsonl").touch()
    found = report(Run(tmp_path))
    assert found["recoveries"] == [{"lost": {"3": "node7"}, "ranks": 0, "step": 4, "again": 0, "seconds": 0}]
    assert found["damaged_lines"] == 1
