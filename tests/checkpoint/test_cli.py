"""``hpcmp checkpoint show`` and ``verify``."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from hpcmp.checkpoint import Slab, save
from hpcmp.cli import checkpoint, common
from hpcmp.comm.mesh import Mesh
from hpcmp.errors import CheckpointError
from tests.checkpoint.cases import TENSORS, write


def call(*words):
    """The result of ``hpcmp checkpoint WORDS``, and its text."""
    top = common.Parser()
    checkpoint.register(top.add_subparsers(required=True))
    args = top.parse_args(["checkpoint", *map(str, words)])
    result = args.run(args)
    assert json.loads(common.to_json(result))
    return result, args.show(result)


def test_show(tmp_path):
    path = write(tmp_path, 12)
    for place in (tmp_path, path):
        result, text = call("show", place)
        assert (result["checkpoint"], result["step"], result["storage"]) == (str(path), 12, "files")
        assert result["layout"] == {"dp": 1, "tp": 2} and "layout      dp=1 tp=2" in text
        sizes = {name: int(np.prod(shape)) for name, (shape, _) in TENSORS.items()}
        assert result["parameters"] == sum(size for name, size in sizes.items() if name.startswith("model/"))
        assert result["tensors"]["model/blocks/1/qkv"] == {"shape": [9, 3, 2, 5], "dtype": "float64", "bytes": 2160}
        assert result["files"] == {"rank_00000.h5": (path / "rank_00000.h5").stat().st_size}
        assert "step 12, saved 2" in text and f"parameters  {result['parameters']:,}" in text
        assert "model/blocks/1/qkv" in text and "9 x 3 x 2 x 5" in text and "scalar" in text
        assert "layers=2 style=gpt" in text


def test_show_gathers_the_layers(tmp_path):
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


def test_verify(tmp_path):
    one, two = write(tmp_path, 1), write(tmp_path, 2)
    result, text = call("verify", tmp_path)
    assert result["exit_code"] == 0 and [entry["problems"] for entry in result["checkpoints"]] == [[], []]
    assert text.splitlines()[0].startswith(f"{two}: whole; 8 tensors, ")
    with open(one / "rank_00000.h5", "r+b") as file:
        file.seek(40)
        file.write(b"\x99")
    result, text = call("verify", tmp_path)
    assert result["exit_code"] == 1 and f"{one}: damaged\n  {one / 'rank_00000.h5'}: " in text
    assert call("verify", two)[0]["exit_code"] == 0
    os.truncate(two / "manifest.json", 9)
    assert call("verify", two)[0]["exit_code"] == 1


@pytest.mark.parametrize("action", ["show", "verify"])
def test_nothing_there(tmp_path, action):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=str(path)) as caught:
            call(action, path)
        assert caught.value.exit_code == 2
