"""``hpcmp report``: of whole runs, of runs that ended in any way, of directories that hold anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcmp.cli import main
from hpcmp.training import plots
from hpcmp.training.config import load_config
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


def test_why_it_hung_is_told(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpcmp.training.report.diagnose", lambda run: [f"rank 3 is missing in {run.name}"])
    code, out, _ = report(capsys, str(trained), "--plot", "none")
    assert code == 0 and out.endswith("why it hung:\n  rank 3 is missing in run\n")
