"""A model in several safetensors files, and its index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcmp.checkpoint.safetensors import write
from hpcmp.checkpoint.safetensors_model import INDEX, NAME, SafetensorsModel, index_text, shards
from hpcmp.errors import CheckpointError
from tests.checkpoint.test_safetensors import put, whole


def save_model(folder: Path, arrays: dict[str, Any], limit: int) -> list[str]:
    folder.mkdir(exist_ok=True)
    files = shards({name: (a.shape, a.dtype) for name, a in arrays.items()}, limit)
    for name, part in files.items():
        write(folder / name, part, lambda tensor: [arrays[tensor]])
    if len(files) > 1:
        (folder / INDEX).write_text(index_text(files))
    return list(files)


def test_a_model_of_several_files(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6.0), "b": np.arange(3.0), "c": np.arange(100.0), "d": np.arange(2.0)}
    files = save_model(tmp_path / "many", arrays, 8 * 9)
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]  # a and b; c, which is larger; d
    assert json.loads((tmp_path / "many" / INDEX).read_text())["metadata"] == {"total_size": 8 * 111}
    assert save_model(tmp_path / "one", arrays, 8 * 111) == [NAME]
    for folder in ("many", "one"):
        with SafetensorsModel(tmp_path / folder) as model:
            assert model.tensors == {name: (a.shape, a.dtype) for name, a in arrays.items()}
            for name, array in arrays.items():
                np.testing.assert_array_equal(model.read(name, whole(array.shape), array.shape), array)


def test_an_index_names_files_beside_it_and_tensors_that_are_there(tmp_path: Path) -> None:
    save_model(tmp_path, {"a": np.arange(6.0), "b": np.arange(6.0)}, 8 * 6)
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    put(tmp_path.parent / "outside.safetensors", {"a": np.zeros(6)})
    for weight_map in (
        {"a": "../outside.safetensors"},
        {"a": str(tmp_path.parent / "outside.safetensors")},
        {"a": "config.json"},
        {"a": ".hidden.safetensors"},
        {"a": 3},
        {"a": two},
        {"a": one, "c": two},
        {"a": "nowhere.safetensors"},
        {},
        [],
        None,
    ):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            SafetensorsModel(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": one}}))
    with SafetensorsModel(tmp_path) as model:
        assert list(model.tensors) == ["a"]
