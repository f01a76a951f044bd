"""``hpcmp report``: of whole runs, of runs that ended in any way, of directories that hold anything."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpcmp.checkpoint import Lock
from hpcmp.checkpoint.owner import Owner, this_process
from hpcmp.cli import main
from hpcmp.training import plots
from hpcmp.training.config import load_config
from hpcmp.training.engine import Engine
from hpcmp.training.trainer import Trainer
from tests.corpus import config, corpus


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    path = config(folder, corpus(folder))
    for steps in (3, 6):
        given = [f"train.steps={steps}", "run.log_seconds=0", "checkpoint.every=2", "run.evaluate_every=3"]
        with Trainer(load_config(path, given)) as trainer:
            trainer.train()
    return folder / "run"


def report(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(["report", *argv])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_a_run_of_two_starts(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    png = tmp_path / "all.png"
    code, out, _ = report(capsys, str(trained), "--plot", str(png), "--json")
    found = json.loads(out)
    assert code == 0 and found["plot"] == str(png) and png.read_bytes().startswith(b"\x89PNG")
    assert (found["step"], found["steps"], found["damaged_lines"], found["diagnosis"]) == (6, 6, 0, [])
    assert [start["step"] for start in found["starts"]] == [0, 3] and found["starts"][0]["ranks"] == 1
    assert found["checkpoints"]["steps"] == [4, 6] and found["checkpoints"]["saves"] == 4
    assert found["loss"]["least"] <= found["loss"]["last"] and found["held_out_loss"]["last"] > 0
    assert found["tokens_per_second"]["median"] > 0 and 0 < found["share_of_peak"]["median"] < 1
    assert set(found["phases"]) == {"data", "compute", "optimizer", "checkpoint", "wait"}
    assert found["phases"]["compute"]["mean"] > found["phases"]["data"]["mean"] > 0
    code, out, _ = report(capsys, str(trained), "--plot", "none")
    for text in (
        "step         6 of 6",
        "gpt, 3 layers of 16",
        "after step 3: 1 rank on 1 host",
        "tokens/s",
        "rank 0 (100%)",
    ):
        assert text in out, out


def test_every_panel_of_a_drawing_has_its_axes_named_and_usual_steps_in_it(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks are compared where there are several, and a single long step does not flatten the others."""
    Figure = pytest.importorskip("matplotlib.figure").Figure
    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: drawn.append(self))
    run = plots.Run(trained)
    for seconds, record in zip((9.0, 1.0, 1.0, 1.0, 8.0, 1.0), run.phases(), strict=True):
        record.spread["compute"].update(mean=seconds, least=seconds, most=seconds)
    looks = run.phases()
    plots.draw(run, tmp_path / "x.png")
    for look in looks:
        look.spread["compute"]["most"] += 1
    monkeypatch.setattr(plots.Run, "phases", lambda self: looks)
    plots.draw(run, tmp_path / "x.png")
    alone, several = ([(a.get_xlabel(), a.get_ylabel()) for a in figure.axes] for figure in drawn)
    assert several[:4] == alone and several[4:] == [
        ("step (dotted: restarts)", "seconds a step,\nfastest to slowest rank")
    ]
    assert [x for x, _ in alone] == ["tokens", *["step (dotted: restarts)"] * 3]
    assert [y.splitlines()[0] for _, y in alone] == ["loss (nats a token)", "tokens/s", "% of peak", "seconds a step,"]
    assert 4 < drawn[0].axes[3].get_ylim()[1] < 5


def test_without_matplotlib_there_is_a_line_and_no_plot(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "possible", lambda: False)
    code, out, _ = report(capsys, str(trained))
    assert code == 0 and 'plots need matplotlib: pip install "hpcmp[plot]"' in out
    assert not (trained / "report.png").exists()


def test_a_plot_that_cannot_be_written_is_told(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    code, out, _ = report(capsys, str(trained), "--plot", "/nowhere/x.png")
    assert code == 0 and "none: /nowhere/x.png: No such file or directory" in out


NONSENSE = [
    {"step": "x", "loss": 1.0},
    {"step": 1, "loss": None},
    {"step": True, "loss": True},
    {"step": 2, "tokens": 5, "loss": float("nan")},
    {"step": 3, "tokens": 6, "loss": 2.5, "tokens_per_second": [1], "phases": {"compute": 3}, "slow": [1, {}, None]},
    {"step": 4, "phases": {name: {"mean": "x"} for name in ("data", "compute", "optimizer", "checkpoint", "wait")}},
    {"slow": 3, "save_seconds": "long", "skipped": "x"},
]


def test_nonsense_is_survived_and_damaged_lines_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps(record).encode() for record in NONSENSE]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines, b"\xff\xfe", b'{"step": 7, "lo']))
    starts = [{"ranks": 3, "hosts": 4, "code": 5, "job": "x", "layout": []}, {}]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    (tmp_path / "config.toml").write_text("[model\n")
    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    for argv in ([], ["--json"]):
        code, out, err = report(capsys, str(tmp_path), *argv)
        assert code == 0, err
    found = json.loads(out)
    assert found["damaged_lines"] == 2 and found["loss"] == {"first": 2.5, "last": 2.5, "least": 2.5}
    assert found["checkpoints"]["incomplete"] == ["step_00000004"] and "line 1" in found["problem"]
    assert found["config"] is None and len(found["starts"]) == 2


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], make: object) -> None:
    make(tmp_path / "x")  # type: ignore[operator]
    code, _, err = report(capsys, str(tmp_path / "x"))
    assert code == 2 and err.startswith(f"hpcmp: error: {tmp_path / 'x'}: ") and err.count("\n") == 1


def first_line(capsys: pytest.CaptureFixture[str], run: Path) -> str:
    """What the report says before anything else, and its JSON too."""
    code, out, _ = report(capsys, str(run), "--plot", "none")
    told = json.loads(report(capsys, str(run), "--json", "--plot", "none")[1])
    assert code == 0 and out.splitlines()[0] == f"{run}: {told['ending']['text']}"
    return f"{told['ending']['how']}: {out.splitlines()[0].removeprefix(f'{run}: ')}"


def test_how_it_ended_comes_first(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert first_line(capsys, trained) == "finished: finished: step 6 of 6"
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    manifest = run / "manifest.jsonl"
    *lines, last = manifest.read_text().splitlines()
    stopped = json.loads(last) | {"step": 5, "finished": False, "reason": "30 s are left to Slurm job 4"}
    manifest.write_text("\n".join([*lines, json.dumps(stopped)]))
    assert first_line(capsys, run) == (
        "stopped: stopped after step 5 of 6: 30 s are left to Slurm job 4; to go on, run it again"
    )
    manifest.write_text("\n".join([*lines, json.dumps(stopped | {"requeued": True})]))
    assert first_line(capsys, run).endswith("4; its job is to run again")
    manifest.write_text("\n".join([*lines, "{}"]))
    assert first_line(capsys, run) == "ended: ended after step 6"
    with Lock(run):
        assert first_line(capsys, run).startswith(f"running: running, after step 6: process {os.getpid()} of ")
    job = {"scheduler": "Slurm", "id": "4"}
    manifest.write_text("\n".join([*lines, json.dumps({"job": job})]))
    (run / "lock").write_bytes(dead().render())
    told = first_line(capsys, run)
    assert told.startswith("killed: killed after step 6, by a signal, for want of memory, or with its node;")
    assert "see the output of Slurm job 4 (process " in told


def dead() -> Owner:
    """A process of this machine that has ended."""
    child = subprocess.Popen(["true"])
    child.wait()
    return replace(this_process(), pid=child.pid)


class Planted(Exception):
    pass


@pytest.mark.parametrize("loss", [math.nan, None])
def test_an_error_is_told_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, loss: float | None
) -> None:
    """One of hpcmp's own, which is in its words, and any other, with its place; and none of an earlier start."""
    toml, begin = config(tmp_path, corpus(tmp_path)), Engine.begin

    def planted(self: Engine, number: int, *args: Any, **more: Any) -> Any:
        if number < 2:
            return begin(self, number, *args, **more)
        if loss is None:
            raise Planted("on purpose")
        result = begin(self, number, *args, **more).result()
        return SimpleNamespace(result=lambda: replace(result, loss=math.nan, trouble="the loss is nan"))

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "begin", planted)
        assert main(["train", str(toml), "train.kernels=reference"]) == (70 if loss is None else 1)
    capsys.readouterr()
    run = tmp_path / "run"
    if loss is None:
        place = f'{__file__}:{planted.__code__.co_firstlineno + 4} planted: raise Planted("on purpose")'
        assert first_line(capsys, run) == f"failed: failed after step 2: Planted: on purpose, at {place}"
    else:
        assert first_line(capsys, run).startswith("failed: failed after step 2: step 2: the loss is nan")
    assert main(["train", str(toml), "train.kernels=reference"]) == 0
    capsys.readouterr()
    assert first_line(capsys, run) == "finished: finished: step 6 of 6"
    assert (run / "diagnosis.old").exists() and not (run / "diagnosis").exists()


def test_the_lines_of_a_diagnosis_follow_the_first(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    text = (run / "manifest.jsonl").read_text()
    (run / "manifest.jsonl").write_text(text[: text.rindex('{"ended"')])
    monkeypatch.setattr("hpcmp.training.report.diagnose", lambda run: [f"rank 3 is missing in {run.name}", "and more"])
    code, out, _ = report(capsys, str(run), "--plot", "none")
    assert code == 0 and out.startswith(f"{run}: failed after step 6: rank 3 is missing in run\n  and more\n\n")
