"""``hpcmp checkpoint`` list, show, verify, diff and repack."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcmp.checkpoint import Slab, open_checkpoint, save
from hpcmp.cli.checkpoint.diff import difference
from hpcmp.cli.checkpoint.progress import Bar
from hpcmp.comm.mesh import Mesh
from hpcmp.errors import CheckpointError, InputError
from tests.checkpoint.cases import STATE, TENSORS, owned, value, version_at, write
from tests.cli.actions import call


def flip(path: Path, name: str = "rank_00000.h5") -> None:
    """Change a bit of the first piece's numbers."""
    at = open_checkpoint(path).manifest.files[name].extents[0][0]
    with open(path / name, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_list(tmp_path: Path) -> None:
    one, two, three = write(tmp_path, 1, keep=None), write(tmp_path, 2, keep=None), write(tmp_path, 3, keep=None)
    os.truncate(two / "manifest.json", 9)
    result, text = call("list", tmp_path)
    assert [entry["checkpoint"] for entry in result["checkpoints"]] == [str(three), str(one), str(two)]
    assert [entry["complete"] for entry in result["checkpoints"]] == [True, True, False]
    newest = result["checkpoints"][0]
    assert (newest["step"], newest["storage"], newest["layout"]) == (3, "files", STATE["layout"])
    lines = text.splitlines()
    assert len(lines) == 4 and lines[1].split()[:2] == ["step_00000003", "3"] and lines[1].endswith("  tp=2")
    assert lines[3].startswith("step_00000002: not complete: ")
    assert call("list", one)[0]["checkpoints"][0]["step"] == 1


def test_show(tmp_path: Path) -> None:
    path = write(tmp_path, 12)
    for place in (tmp_path, path):
        result, text = call("show", place)
        assert (result["checkpoint"], result["step"], result["storage"]) == (str(path), 12, "files")
        assert result["layout"] == {"dp": 1, "tp": 2} and "layout      tp=2" in text
        sizes = {name: int(np.prod(shape)) for name, (shape, _) in TENSORS.items()}
        assert result["parameters"] == sum(size for name, size in sizes.items() if name.startswith("model/"))
        assert result["tensors"]["model/blocks/1/qkv"] == {"shape": [9, 3, 2, 5], "dtype": "float64", "bytes": 2160}
        assert result["files"] == {name: (path / name).stat().st_size for name in ("rank_00000.h5", "tensors.h5")}
        assert "step 12, saved 2" in text and f"parameters  {result['parameters']:,}" in text
        assert "model/blocks/1/qkv" in text and "9 x 3 x 2 x 5" in text and "scalar" in text
        assert "layers=2 style=gpt" in text


def test_show_digests(tmp_path: Path) -> None:
    path = write(tmp_path, 12)
    result, text = call("show", path, "--digests")
    manifest = json.loads((path / "manifest.json").read_text())
    for name, tensor in manifest["tensors"].items():
        (piece,) = result["tensors"][name]["pieces"]
        assert list(piece["count"]) == tensor["shape"] and piece["digest"] == tensor["pieces"][0]["digest"]
        assert any(line.startswith(name) and line.endswith(piece["digest"]) for line in text.splitlines())
    assert "[0:7, 0:11]" in text and "[]" in text


def test_show_gathers_the_layers(tmp_path: Path) -> None:
    names = [f"model/blocks/{i}/mlp/up" for i in (0, 1, 2, 10, 11)] + ["model/blocks/3/mlp/up"] + ["model/z"]
    slabs = []
    for name in names:
        columns = 4 if "/3/" in name else 3
        slabs.append(Slab(name, (2, columns), (slice(0, 2), slice(0, columns)), np.zeros((2, columns), "f4")))
    save(tmp_path, 1, slabs, {}, Mesh())
    lines = call("show", tmp_path)[1].splitlines()
    rows = [line.split() for line in lines if line.startswith("model/")]
    assert rows == [
        "model/blocks/0-2,10-11/mlp/up 5 x 2 x 3 float32 120 B".split(),
        "model/blocks/3/mlp/up 2 x 4 float32 32 B".split(),
        "model/z 2 x 3 float32 24 B".split(),
    ]
    assert len({line.index("float32") for line in lines if "float32" in line}) == 1


def test_verify(tmp_path: Path) -> None:
    one, two = write(tmp_path, 1), write(tmp_path, 2)
    result, text = call("verify", tmp_path)
    assert result["exit_code"] == 0 and [entry["problems"] for entry in result["checkpoints"]] == [[], []]
    assert text.splitlines()[0].startswith(f"{two}: whole; 8 tensors, ")
    flip(one)
    result, text = call("verify", tmp_path)
    assert result["exit_code"] == 1 and f"{one}: damaged\n  {one / 'rank_00000.h5'}: " in text
    assert call("verify", two)[0]["exit_code"] == 0
    os.truncate(two / "manifest.json", 9)
    assert call("verify", two)[0]["exit_code"] == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 1)
    monkeypatch.setattr("hpcmp.cli.checkpoint.progress.EVERY", 0.0)
    call("verify", tmp_path)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    call("verify", tmp_path)
    states = screen.getvalue().split("\r\x1b[K")
    assert states[0] == states[-1] == "" and len(states) == 2 + 8  # one a tensor, and wiped
    assert states[-2].startswith(f"step_00000001  [{'=' * 30}] 100%  ")
    monkeypatch.setattr(sys, "stderr", quiet := Terminal())
    with Bar("other", rank=1) as bar:
        bar(1, 2)
    assert quiet.getvalue() == ""


def arrays(version: int = 0, **change: Any) -> dict[str, Any]:
    return {name: value(name, version) for name, (shape, _) in TENSORS.items() if 0 not in shape} | change


def put(root: Path, tensors: dict[str, Any], step: int = 1, state: Any = STATE, **options: Any) -> Path:
    slabs = [Slab(name, a.shape, tuple(slice(0, n) for n in a.shape), a) for name, a in tensors.items()]
    return save(root, step, slabs, state, Mesh(), **options)


def test_diff_of_equal_tensors(tmp_path: Path) -> None:
    a = put(tmp_path / "a", arrays() | {"nan": np.array([np.nan, 0.0, np.inf])})
    b = put(
        tmp_path / "b", arrays() | {"nan": np.array([np.nan, -0.0, np.inf])}, 2, STATE | {"loss": 2}, storage="mpio"
    )
    result, text = call("diff", a, b)
    assert result["equal"] and result["exit_code"] == 0 and result["compared"] == 9 and not result["different"]
    assert result["state"] == {"loss": [1.25, 2]} and text.splitlines()[-1] == "equal: 9 tensors"
    lines = [line.split() for line in text.splitlines()]
    assert lines[-4:] == [["state", "that", "differs", "A", "B"], ["loss", "1.25", "2"], [], ["equal:", "9", "tensors"]]


def test_diff_says_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcmp.checkpoint.slab.BLOCK", 40)
    first = arrays()
    second = {name: array.copy() for name, array in first.items() if name != "tokenizer"}
    second["model/wide"][2, 4000:4003] *= 2
    second["model/blocks/1/qkv"] = second["model/blocks/1/qkv"].astype("f4")
    second["model/blocks/0/norm"] = np.append(second["model/blocks/0/norm"], np.float32(1))
    second["more"] = np.zeros(2)
    put(tmp_path / "a", first), put(tmp_path / "b", second)
    result, text = call("diff", tmp_path / "a", tmp_path / "b")
    assert result["exit_code"] == 1 and not result["equal"]
    assert result["only_a"] == ["tokenizer"] and result["only_b"] == ["more"]
    assert set(result["different"]) == {"model/wide", "model/blocks/1/qkv", "model/blocks/0/norm"}
    wide = result["different"]["model/wide"]
    assert (wide["count"], wide["of"], wide["relative"]) == (3, 3 * 4099, 0.5)
    assert wide["absolute"] == np.abs(first["model/wide"][2, 4000:4003].astype("f8")).max()
    qkv = result["different"]["model/blocks/1/qkv"]
    assert qkv["dtypes"] == ["float64", "float32"] and 0 < qkv["relative"] < 1e-7 and qkv["count"] > 200
    assert result["different"]["model/blocks/0/norm"] == {"shapes": [[19], [20]]}
    for line in ("only in A: tokenizer", "only in B: more", "model/blocks/0/norm: shape [19] in A, [20] in B"):
        assert line in text.splitlines()
    assert text.splitlines()[-1] == "differ: 3 of 7 tensors in both, 2 in one"
    assert call("diff", tmp_path / "a", tmp_path / "b", "--only", "optimizer/")[0]["exit_code"] == 0


def test_differences_of_numbers() -> None:
    inf, nan = np.inf, np.nan
    for x, y, expected in (
        ([1.0, 2.0], [1.0, 2.0], (0, 0, 0)),
        ([1.0, -2.0], [1.5, -2.0], (1, 0.5, 1 / 3)),
        ([0.0, 4.0], [1e-9, 3.0], (2, 1.0, 1.0)),
        ([nan, 1.0], [1.0, nan], (2, inf, inf)),
        ([inf, inf], [-inf, inf], (1, inf, inf)),
        ([nan, inf], [nan, inf], (0, 0, 0)),
    ):
        assert difference(np.array(x), np.array(y)) == pytest.approx(expected)
    assert difference(np.int64(2**62), np.int64(2**62 + 1))[0] == 1  # equal as float64
    assert difference(np.array(3, "u1"), np.array(250, "u1"))[:2] == (1, 247)


def test_diff_reads_no_damage(tmp_path: Path) -> None:
    a, b = put(tmp_path / "a", arrays()), put(tmp_path / "b", arrays())
    flip(b)
    with pytest.raises(CheckpointError, match=f"{b}.*damaged"):
        call("diff", a, b)


def test_repack(tmp_path: Path) -> None:
    path = write(tmp_path / "a", 7)
    result, text = call("repack", path, tmp_path / "b", "--storage", "shared")
    made = open_checkpoint(tmp_path / "b")
    assert result["checkpoint"] == str(made.path) and made.manifest.storage == "shared" == result["storage"]
    assert (made.step, made.state) == (7, STATE) and version_at(made.path) == 7
    assert text.startswith(f"{made.path}: step 7, storage shared: 1 file, ")
    assert call("diff", path, made.path)[0]["equal"]
    with pytest.raises(InputError, match="tape"):
        call("repack", path, tmp_path / "c", "--storage", "tape")
    shutil.rmtree(tmp_path / "b")
    flip(path)
    with pytest.raises(CheckpointError, match="damaged"):
        call("repack", path, tmp_path / "b", "--storage", "shared")


def test_a_long_state_is_wrapped_and_a_strange_one_does_no_harm(tmp_path: Path) -> None:
    state = {
        "config": {"model": {f"key_of_the_model_{i}": i for i in range(12)}, "other": "\x1b[2J"},
        "layout": {"tp": 4, "dp": 2, "pp": 1, "\x1b]0;": 3, "schedule": "1f1b"},
        "long": "word " * 10000,
    }
    put(tmp_path / "a", arrays(), state=state)
    text = call("show", tmp_path / "a")[1]
    lines = text.splitlines()
    assert all(f"key_of_the_model_{i}={i}" in text for i in range(12)) and max(map(len, lines)) <= 118
    assert lines[2] == "layout      ?]0;=3 dp=2 tp=4" and "\x1b" not in text
    assert sum("word word" in line for line in lines) == 8 and lines[-1].endswith(" ...")
    assert call("list", tmp_path / "a")[1].endswith("  ?]0;=3 dp=2 tp=4")
    put(tmp_path / "b", arrays(), state={"layout": "\x1b", "config": 7})
    assert "layout            ?" in call("show", tmp_path / "b")[1] and "\x1b" not in call("list", tmp_path / "b")[1]
    assert "\x1b" not in call("diff", tmp_path / "a", tmp_path / "b")[1]


def test_the_blocks_of_a_difference_share_a_line(tmp_path: Path) -> None:
    names = [f"model/blocks/{i}/{name}" for i in (0, 1, 2, 11) for name in ("bias", "weight")]
    put(tmp_path / "a", {name: np.zeros(2, "f4") for name in names})
    put(tmp_path / "b", {name: np.zeros(3 if "/2/" in name else 2, "f8") for name in names if "bias" not in name})
    lines = call("diff", tmp_path / "a", tmp_path / "b")[1].splitlines()[2:]
    assert lines[:3] == [
        "only in A: model/blocks/0-2,11/bias",
        "model/blocks/2/weight: shape [2] in A, [3] in B",
        "model/blocks/0-2,11/weight: dtype float32 in A, float64 in B",
    ]
    with pytest.raises(InputError, match="--only modle/: no tensor's name begins so; they begin with model"):
        call("diff", tmp_path / "a", tmp_path / "b", "--only", "modle/")


def test_the_folder_of_the_run_is_not_that_of_its_checkpoints(tmp_path: Path) -> None:
    write(tmp_path / "run" / "checkpoints", 1)
    for action in ("list", "show", "verify"):
        with pytest.raises(CheckpointError, match="no checkpoint in it, but in .*run/checkpoints$"):
            call(action, tmp_path / "run")


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_full_disk_under_stdout_is_one_line(tmp_path: Path, flags: list[str]) -> None:
    words = [sys.executable, "-m", "hpcmp", "checkpoint", "show", str(write(tmp_path, 1)), *flags]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "hpcmp: error: stdout: No space left on device\n")


def test_a_plain_file_is_no_target(tmp_path: Path) -> None:
    path = write(tmp_path / "a", 1)
    (tmp_path / "file").write_text("")
    for target in ("file", "file/in/it"):
        with pytest.raises(InputError, match="file: is no folder"):
            call("repack", path, tmp_path / target, "--storage", "shared")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a", "file"]


@pytest.mark.parametrize("action", ["list", "show", "verify", "diff", "repack"])
def test_nothing_there(tmp_path: Path, action: str) -> None:
    more = {"diff": [write(tmp_path / "x", 1)], "repack": [tmp_path / "y", "--storage", "files"]}.get(action, [])
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(CheckpointError, match=str(path)) as caught:
            call(action, path, *more)
        assert caught.value.exit_code == 2


def test_repack_on_ranks(tmp_path: Path, run_mpi: Callable[..., Any]) -> None:
    save(tmp_path / "a", 3, owned(Mesh()), STATE, Mesh())
    words = ["checkpoint", "repack", str(tmp_path / "a"), str(tmp_path / "b"), "--storage", "files", "--json"]
    done = run_mpi(2, [sys.executable, "-m", "hpcmp", *words])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"rank_00000.h5", "rank_00001.h5"} <= result["files"].keys()
    assert call("diff", tmp_path / "a", tmp_path / "b")[0]["equal"]
