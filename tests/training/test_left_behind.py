"""Exports and imports that are killed on the way: nothing is taken for whole, and the next ones clear it away."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hpcmp.checkpoint import Slab, open_checkpoint, save
from hpcmp.checkpoint.directory import hidden
from hpcmp.comm.mesh import Mesh
from hpcmp.errors import InputError
from hpcmp.models.transformer import build
from hpcmp.training.config import Config, Model
from hpcmp.training.engine import architecture
from hpcmp.training.exporting import export_model
from hpcmp.training.importing import import_model

Killed = Callable[[Callable[[], object]], int]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The checkpoint of a small GPT."""
    config = Config(model=Model(layers=1, hidden=8, heads=2, vocabulary=11, sequence=5)).resolved(ranks=1)
    parameters = build(architecture(config)).parameters()
    slabs = [
        Slab(f"model/{p.name}", p.shape, tuple(slice(0, n) for n in p.shape), np.ones(p.shape, "f4"))
        for p in parameters
    ]
    return save(tmp_path / "source", 7, slabs, {"config": config.to_dict()}, Mesh())


@pytest.fixture
def killed() -> Iterator[Killed]:
    """killed(work): the number of a child process that ended itself by SIGKILL in ``work``; a zombie until the end."""
    children = []

    def run(work: Callable[[], object]) -> int:
        children.append(child := os.fork())
        if child == 0:
            try:
                work()
            finally:
                os._exit(3)
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert ended and (ended.si_code, ended.si_status) == (os.CLD_KILLED, signal.SIGKILL)
        return child

    yield run
    for child in children:
        os.waitpid(child, 0)


def die(done: int, total: int) -> None:
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_export(tmp_path: Path, source: Path, killed: Killed) -> None:
    place = tmp_path / "models"
    checkpoint = open_checkpoint(source)
    child = killed(lambda: export_model(checkpoint, place / "out", progress=die))
    (left,) = names(place)
    assert left.startswith(f".out.tmp-{child}@") and names(place / left) == ["model.safetensors"]
    other = place / left.replace(".out.", ".other.")  # a dead process's too, but of another place
    shutil.copytree(place / left, other)
    mine = hidden(place / "out", "tmp")
    alive = mine.with_name(mine.name.replace(f"-{os.getpid()}@", "-1@"))
    alive.mkdir()  # of process 1, which lives
    export_model(checkpoint, place / "out")
    assert names(place) == sorted([other.name, alive.name, "out"])
    assert names(place / "out") == ["config.json", "model.safetensors"]


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("hpcmp.training.exporting.write_file", full)
    with pytest.raises(InputError, match="No space left"):
        export_model(open_checkpoint(source), tmp_path / "models" / "out")
    assert names(tmp_path / "models") == []


@pytest.mark.parametrize("phase", ["write", "manifest", "rename"])
def test_import(tmp_path: Path, source: Path, killed: Killed, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    export_model(open_checkpoint(source), tmp_path / "out")
    monkeypatch.setenv("HPCMP_FAILPOINT", f"{phase}:0")
    child = killed(lambda: import_model(tmp_path / "out", tmp_path / "in", Mesh()))
    monkeypatch.delenv("HPCMP_FAILPOINT")
    (left,) = names(tmp_path / "in")
    assert left.startswith(f".step_00000000.tmp-{child}@")
    import_model(tmp_path / "out", tmp_path / "in", Mesh())
    assert names(tmp_path / "in") == ["latest", "step_00000000"]
