"""Fault: a log or metrics file that is full, read-only or torn costs records, and never the run."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
from pathlib import Path

import pytest

from hpcmp.training.config import load_config
from hpcmp.training.metrics import Metrics
from hpcmp.training.records import Records, read_records
from hpcmp.training.trainer import Trainer
from tests import faults
from tests.corpus import config, corpus


def test_what_is_written_is_read(tmp_path: Path) -> None:
    records = Records(tmp_path / "r.jsonl")
    for i in range(3):
        records.write({"step": i, "text": "é\n"})
    assert read_records(records.path) == ([{"step": i, "text": "é\n"} for i in range(3)], 0)


def test_damaged_lines_are_counted_and_those_around_them_kept(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"step": 0}\n\xff\xfe{\n{"step": 1\n[1, 2]\n\n' + b"[" * 100_000 + b'\n{"step": 2}\n{"st')
    Records(path).write({"step": 3})
    found, damaged = read_records(path)
    assert [record["step"] for record in found] == [0, 2, 3] and damaged == 5


def test_a_resumed_run_forgets_the_steps_that_it_takes_again(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.forget_after(0)
    for i in range(5):
        metrics.write({"step": i})
    with metrics.path.open("a") as file:
        file.write('{"step": 5, "lo')
    metrics.forget_after(3)
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.fault(23)
def test_a_full_disk_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    metrics = Metrics(tmp_path)
    with caplog.at_level(logging.WARNING, "hpcmp"):
        for i in range(3):
            metrics.write({"step": i})
    assert len(caplog.records) == 1 and "No space left" in caplog.text


def test_a_limit_tears_a_line_and_later_ones_stand_alone(tmp_path: Path) -> None:
    def work() -> str:
        records = Records(tmp_path / "r.jsonl")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        records.write({"step": 0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
        records.write({"step": 1})  # eight bytes of it
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        records.write({"step": 2})
        return "done"

    assert faults.in_child(work) == "done"
    found, damaged = read_records(tmp_path / "r.jsonl")
    assert [record["step"] for record in found] == [0, 2] and damaged == 1


@pytest.mark.fault(23)
def test_a_directory_that_becomes_read_only_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = config(tmp_path, corpus(tmp_path))
    where = [f"checkpoint.directory={tmp_path / 'elsewhere'}", "run.log_seconds=0", "run.rank_logs=true"]
    with Trainer(load_config(path, where), None) as trainer, caplog.at_level(logging.WARNING, "hpcmp"):
        steps = iter(trainer)
        next(steps)
        for file in (*(tmp_path / "run").rglob("*"), tmp_path / "run"):
            file.chmod(0o555 if file.is_dir() else 0o444)
        try:
            with faults.permissions():
                assert sum(1 for _ in steps) == 5
        finally:
            for file in (tmp_path / "run", *(tmp_path / "run").rglob("*")):
                file.chmod(0o755)
    warnings = [r.message for r in caplog.records if "training goes on without" in r.message]
    assert len(warnings) == 2  # the metrics, and the rank's log
    assert [r["step"] for r in read_records(trainer.metrics.path)[0] if "loss" in r] == [0]


def test_stderr_that_is_full_ends_no_run(tmp_path: Path) -> None:
    import subprocess
    import sys

    path = config(tmp_path, corpus(tmp_path))
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hpcmp", "train", str(path), "train.steps=2", "--json"],
            stdout=subprocess.PIPE,
            stderr=full,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=50,
        )
    assert json.loads(done.stdout)["finished"] and done.returncode in (0, 120), done  # 120: Python's own, at its end
