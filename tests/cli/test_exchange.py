"""``hpcmp checkpoint export`` and ``import``, as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpcmp.checkpoint import open_checkpoint
from hpcmp.cli.checkpoint.exports import _bytes
from tests.cli.actions import call
from tests.corpus import config, corpus

HPCMP = [sys.executable, "-m", "hpcmp"]
LLAMA = "model.style=llama", "model.dropout=0", "model.rope_theta=500"


def hpcmp(*argv: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HPCMP_KERNELS": "reference"}  # which load at once
    return subprocess.run([*HPCMP, *map(str, argv)], env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run of a small Llama."""
    folder = tmp_path_factory.mktemp("trained")
    done = hpcmp("train", config(folder, corpus(folder)), *LLAMA, "train.steps=2", "--json")
    assert done.returncode == 0, done.stderr
    return folder


def test_there_and_back_and_on(tmp_path: Path, trained: Path) -> None:
    run = trained / "run" / "checkpoints"
    result, text = call("export", run, tmp_path / "out")
    assert result["step"] == 2 and result["files"].keys() == {"config.json", "model.safetensors"}
    assert text.splitlines()[0] == f"{tmp_path / 'out'}: the model of {run / 'step_00000002'} (step 2)"
    result, text = call("import", tmp_path / "out", tmp_path / "in")
    assert call("diff", run, tmp_path / "in", "--only", "model/")[0]["equal"]
    assert result["model"]["style"] == "llama" and result["model"]["kv_heads"] == 2
    said = [hpcmp("generate", place, "--prompt", "def", "--tokens", "30", "--json") for place in (run, tmp_path / "in")]
    assert json.loads(said[0].stdout)["text"] == json.loads(said[1].stdout)["text"]
    written = tmp_path / "new.toml"  # what import prints is what a run needs
    written.write_text(f'{text.split(chr(10), 2)[2]}\n[data]\npath = "{trained / "tokens.h5"}"\n[train]\nsteps = 1\n')
    done = hpcmp("train", written, f"run.directory={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert f"checkpoint.initial: the weights are those of {tmp_path / 'in' / 'step_00000000'}" in done.stderr


def test_on_ranks(tmp_path: Path, trained: Path, run_mpi: Callable[..., Any]) -> None:
    words = ["checkpoint", "export", str(trained / "run" / "checkpoints"), str(tmp_path / "out")]
    done = run_mpi(2, [*HPCMP, *words, "--max-shard-size", "5kB", "--json"])
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["files"]) > 3
    done = run_mpi(3, [*HPCMP, "checkpoint", "import", str(tmp_path / "out"), str(tmp_path / "in"), "--json"])
    assert done.returncode == 0, done.stderr
    assert sum(name.startswith("rank_") for name in open_checkpoint(tmp_path / "in").manifest.files) == 3
    assert call("diff", trained / "run" / "checkpoints", tmp_path / "in", "--only", "model/")[0]["equal"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["export", "{run}", "{run}"], "is there already"),
        (["export", "{run}/nowhere", "{tmp}/out"], "nowhere"),
        (["export", "{run}", "{tmp}/out", "--max-shard-size", "five"], "--max-shard-size"),
        (["export", "{run}", "{run}/latest/out"], "latest: is no folder"),
        (["import", "{tmp}", "{tmp}/in"], "no config.json in it"),
        (["import", "{run}", "{run}/latest"], "latest: is no folder"),
        (["import", "{tmp}/nowhere", "{tmp}/in"], "nowhere"),
        (["import", "{tmp}", "{tmp}/in", "--tokenizer", "{tmp}/nothing"], "nothing"),
    ],
)
def test_bad_input_gets_one_line_and_exit_2(tmp_path: Path, trained: Path, argv: list[str], said: str) -> None:
    run = trained / "run" / "checkpoints"
    done = hpcmp("checkpoint", *(word.format(run=run, tmp=tmp_path) for word in argv))
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("hpcmp: error:") and said in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_sizes() -> None:
    assert [_bytes(text) for text in ("5GB", "500 mb", "1.5k", "7", "2T")] == [
        5 * 10**9,
        5 * 10**8,
        1500,
        7,
        2 * 10**12,
    ]
