"""``hpcmp train --profile``: whole runs on any layout, and the command."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hpcmp.cli import main
from hpcmp.comm.recorder import LENGTH, RECORDER
from hpcmp.training.config import load_config
from hpcmp.training.profile_ranges import layers
from hpcmp.training.profile_summary import COLUMNS, SHARES
from hpcmp.training.profile_trace import Check
from hpcmp.training.trainer import Trainer
from tests.corpus import config, corpus

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


def problems(trace: dict[str, Any], error: float = 0.0) -> list[str]:
    check = Check(error)
    for rank, some in sorted(by_rank(trace["traceEvents"]).items()):
        check.add(rank, some)
    return check.problems()


def by_rank(some: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    found = defaultdict(list)
    for event in some:
        found[event["pid"]].append(event)
    return found


def layout(kind: str, ranks: int) -> list[str]:
    half = math.gcd(ranks, 2)
    given = {"dp": [], "tp": [f"tp={half}", "sequence_parallel=true"], "pp": [f"pp={half}"], "zero": ["zero=3"]}
    given["tp pp"] = ["tp=2", "pp=2"] if ranks % 4 == 0 else ["recompute=full"]
    return [f"layout.{each}" for each in given[kind]]


def on(kind: str, *sizes: int) -> Any:
    """A kind of layout, on the numbers of ranks on which it is one of its own."""
    return pytest.param(kind, marks=[pytest.mark.mpi(size=size) for size in sizes], id=kind)


@pytest.mark.parametrize(
    "kind", [on("dp", 1, 3), on("tp", 2, 4), on("pp", 2, 4), on("zero", 1, 2, 4), on("tp pp", 3, 4, 8)]
)
def test_a_profile_of_a_run(world: Intracomm, mpi_tmp_path: Path, kind: str) -> None:
    if world.rank == 0:
        config(mpi_tmp_path, corpus(mpi_tmp_path))
    world.Barrier()
    given = ["train.steps=5", "checkpoint.every=3", *layout(kind, world.size)]
    with Trainer(load_config(mpi_tmp_path / "tiny.toml", given), world) as trainer:
        stages, schedule, pp = trainer.engine.stages, trainer.engine.pipeline.schedule, trainer.mesh["pp"]
        summary = trainer.train(profile=2)["profile"]
        assert not any("forward" in vars(module) for stage in stages for _, module in layers(stage))
        assert RECORDER.records.maxlen == LENGTH and trainer.engine.phases.ranges is None
        actions = trainer.mesh.gather_objects(list(schedule(pp.rank, pp.size, trainer.engine.microbatches())))
        shape, coordinates = trainer.mesh.shape, trainer.mesh.gather_objects(trainer.mesh.coordinates)
    if world.rank:
        return
    trace = json.loads((mpi_tmp_path / "run" / "profile" / "trace.json").read_text())
    assert json.loads((mpi_tmp_path / "run" / "profile" / "summary.json").read_text()) == summary
    assert (summary["first"], summary["steps"], summary["problems"]) == (2, 2, []) and problems(trace) == []
    assert [set(rank) for rank in summary["ranks"]] == [set(COLUMNS)] * world.size
    for rank in summary["ranks"]:
        assert sum(rank[share] for share in SHARES) == pytest.approx(rank["step"], rel=1e-9)
        assert all(value >= -1e-12 for value in rank.values()) and rank["compute"] > 0 < rank["optimizer"]
        assert rank["exposed"] + rank["bubble"] <= rank["communication"] + 1e-9
        assert rank["bubble"] == 0 or shape["pp"] > 1
    ranks = by_rank(trace["traceEvents"])
    assert set(ranks) == set(range(world.size))
    for number, some in ranks.items():
        assert [e["name"] for e in some if e.get("cat") == "step"] == ["step 2", "step 3"]
        ran = [e["name"] for e in some if e.get("cat") == "action"]
        assert ran == 2 * list(map(str, actions[number]))
        assert {e["name"] for e in some if e.get("cat") == "phase"} == {"data", "compute", "optimizer", "checkpoint"}
        assert coordinates[number]["pp"] or any(e["name"] == "embedding forward" for e in some)
        talk = {e["args"]["axes"] for e in some if e["ph"] == "b"}
        assert {axis for axis in ("pp", "tp") if shape[axis] > 1} <= talk
    seen = {e["name"] for some in ranks.values() for e in some if e.get("cat") == "layer"}
    calls = ("forward", "backward", "weight gradient")
    assert {f"blocks/{i}/mlp/up {call}" for i in range(3) for call in calls} <= seen
    assert {"loss forward", "loss backward", "blocks/1/attention/core backward"} <= seen


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed, in the result, and in the report; and words that fit no number are refused in a line."""
    path = str(config(tmp_path, corpus(tmp_path)))
    assert main(["train", path, "train.steps=2", f"run.directory={tmp_path / 'plain'}", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main(["train", path, "train.steps=2", "--profile", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    found = result["profile"]
    assert plain["profile"] is None and plain["loss"] == result["loss"]  # a profile changes nothing
    assert (found["first"], found["steps"]) == (0, 2)  # there are no more
    assert main(["report", str(tmp_path / "run"), "--plot", "none", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["profile"] == found
    assert main(["report", str(tmp_path / "run"), "--plot", "none"]) == 0
    text = capsys.readouterr().out
    assert "profile of steps 0 to 1" in text and "longest layers" in text and "share of a step" in text
    (tmp_path / "run" / "profile" / "summary.json").write_text('{"ranks": 3}')
    assert main(["report", str(tmp_path / "run"), "--plot", "none", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["profile"] is None
    for word in ("0", "train.steps=4"):
        assert main(["train", path, "--profile", word]) == 2
        assert "no number of steps" in capsys.readouterr().err
