"""Saving and loading in one process: every kind of slab, every refusal, and nothing changed by a refusal."""

from __future__ import annotations

import json
import math
import os
import re
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcmp.checkpoint import CheckpointSaveError, Slab, checkpoints, open_checkpoint, save, slab, writer
from hpcmp.comm.mesh import Mesh
from hpcmp.errors import CheckpointError, InputError
from tests.checkpoint.cases import (
    STATE,
    TENSORS,
    assert_filled,
    assert_untouched,
    by_name,
    owned,
    targets,
    value,
    version_at,
    write,
)

STORAGES = ["files", "node", "shared", "mpio"]  # in one process the last needs no MPI


def whole(name: str, data: np.ndarray) -> Slab:
    return Slab(name, data.shape, tuple(slice(0, n) for n in data.shape), data)


@pytest.mark.parametrize("storage", STORAGES)
def test_round_trip(tmp_path, storage):
    path = write(tmp_path, 100, 3, storage=storage)
    assert path == tmp_path / "step_00000100"
    found = open_checkpoint(tmp_path)
    assert (found.path, found.step, found.state, found.manifest.storage) == (path, 100, STATE, storage)
    expected = {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in TENSORS.items() if math.prod(shape)}
    assert found.tensors == expected
    slabs = targets(Mesh())
    found.load(slabs)
    assert_filled(slabs, 3)
    assert found.verify() == []
    assert found.unused(["model/scale", "other"]) == sorted(set(expected) - {"model/scale"})
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", *found.manifest.files]


@pytest.mark.parametrize("storage", STORAGES)
def test_blocks_smaller_than_a_row_change_nothing(tmp_path, storage, monkeypatch):
    path = write(tmp_path / "a", 1, storage=storage)
    monkeypatch.setattr(slab, "BLOCK", 40)
    cut = write(tmp_path / "b", 1, storage=storage)
    assert version_at(path) == version_at(cut) == 1
    assert open_checkpoint(path).manifest.tensors == open_checkpoint(cut).manifest.tensors


def test_many_pieces_of_one_tensor_from_one_rank(tmp_path):
    data = value("model/wide")
    cuts = [slice(0, 1000), slice(1000, 1001), slice(1001, 4099)]
    parts = [Slab("x", data.shape, (slice(0, 3), cut), data[:, cut]) for cut in reversed(cuts)]
    save(tmp_path, 1, parts, {}, Mesh())
    found = open_checkpoint(tmp_path)
    np.testing.assert_array_equal(found.read("x"), data)
    np.testing.assert_array_equal(found.read("x", (slice(1, 2), slice(990, 1010))), data[1:2, 990:1010])
    np.testing.assert_array_equal(found.read("x", (slice(-1, None), slice(None, 7))), data[-1:, :7])


def test_strided_and_big_endian_data(tmp_path):
    base = np.arange(60, dtype=">f8").reshape(6, 10)
    save(tmp_path, 1, [whole("a", base.T), whole("b", base[::2, ::-3])], {}, Mesh())
    target = np.zeros((10, 12), "float32")[:, ::2]
    found = open_checkpoint(tmp_path)
    found.load([whole("a", target)])
    np.testing.assert_array_equal(target, base.T)
    np.testing.assert_array_equal(found.read("b"), base[::2, ::-3])


def test_plain_h5py_reads_it(tmp_path):
    path = write(tmp_path, 4)
    with h5py.File(path / "rank_00000.h5") as file:
        dataset = file["model/blocks/0/up/weight"]
        np.testing.assert_array_equal(dataset[...], value("model/blocks/0/up/weight", 4))
        assert dataset.chunks is None and dataset.dtype == np.dtype("<f4")
        assert list(dataset.attrs["start"]) == [0, 0] and list(dataset.attrs["shape"]) == [7, 11]


def test_no_rank_needs_a_whole_tensor_in_memory_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(slab, "BLOCK", 1 << 16)
    data = np.ones((1000, 2000), "float32")
    tracemalloc.start()
    save(tmp_path, 1, [whole("x", data)], {}, Mesh())
    found = open_checkpoint(tmp_path)
    found.load([whole("x", data)])
    assert found.verify() == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20  # of 8 MB


@pytest.mark.parametrize("target", ["float32", "float64"])
def test_float32_and_float64_are_converted(tmp_path, target):
    for source in ("float32", "float64"):
        data = np.linspace(0, 1, 7).astype(source)
        save(tmp_path, 1, [whole("x", data)], {}, Mesh())
        into = np.zeros(7, target)
        open_checkpoint(tmp_path).load([whole("x", into)])
        np.testing.assert_array_equal(into, data.astype(target))


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("model/nothing", np.zeros(3, "float32"), "there is no tensor model/nothing"),
        ("model/blocks/0/up/weight", np.zeros((11, 7), "float32"), r"has shape \(7, 11\), the model \(11, 7\)"),
        ("model/blocks/0/up/weight", np.zeros((7, 12), "float32"), r"has shape \(7, 11\), the model \(7, 12\)"),
        ("model/blocks/0/up/weight", np.zeros((7, 11), "float16"), "dtype float32, the model float16"),
        ("model/blocks/0/up/weight", np.zeros((7, 11), "int32"), "dtype float32, the model int32"),
        ("model/wide", np.zeros((3, 4099), "float32"), "dtype float16, the model float32"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(tmp_path, name, data, words):
    write(tmp_path, 1)
    slabs = [s for s in targets(Mesh()) if s.name != name]
    data[...] = 77
    for order in ([*slabs, whole(name, data)], [whole(name, data), *slabs]):
        with pytest.raises(CheckpointError, match=words) as caught:
            open_checkpoint(tmp_path).load(order)
        assert "\n" not in str(caught.value) and str(tmp_path / "step_00000001") in str(caught.value)
        assert_untouched(slabs)
        assert (data == 77).all()


def test_a_tensor_that_is_not_there_cannot_be_read(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(CheckpointError, match="there is no tensor model/x"):
        open_checkpoint(tmp_path).read("model/x")


@pytest.mark.parametrize(
    ("slabs", "words"),
    [
        ([Slab("x", (4,), (slice(0, 3),), np.zeros(3))], "x: only 3 of 4 elements are there"),
        ([Slab("x", (4,), (slice(0, 3),), np.zeros(3)), Slab("x", (4,), (slice(2, 4),), np.zeros(2))], "overlap"),
        ([Slab("x", (4,), (slice(0, 4),), np.zeros(3))], "the data have shape"),
        ([whole("x", np.zeros(3)), Slab("x", (4,), (slice(3, 4),), np.zeros(1))], r"x: float64 \(4,\) on rank 0"),
        ([whole("../x", np.zeros(3))], "cannot be a tensor's name"),
        ([whole("/x", np.zeros(3))], "cannot be a tensor's name"),
        ([whole("x", np.zeros(3)), whole("x/y/z", np.zeros(3))], "x is a tensor, so that x/y/z cannot be one"),
        ([whole("x", np.zeros(3, bool))], "dtype bool cannot be saved"),
        ([whole("x", np.zeros(3, object))], "dtype object cannot be saved"),
    ],
)
def test_slabs_that_cannot_be_saved(tmp_path, slabs, words):
    write(tmp_path, 1)
    with pytest.raises(CheckpointSaveError, match=words) as caught:
        save(tmp_path, 2, slabs, {}, Mesh())
    assert str(caught.value).startswith(f"{tmp_path}: step 2 is not saved: ") and "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_state_must_be_json(tmp_path):
    for state in ({"x": np.float32(1)}, {"x": {1, 2}}, {1: 2, "a": 3}):
        with pytest.raises(CheckpointSaveError, match="TypeError"):
            save(tmp_path, 1, [], state, Mesh())
    save(tmp_path, 1, [], {"loss": math.nan, "tuple": (1, 2)}, Mesh())
    state = open_checkpoint(tmp_path).state
    assert math.isnan(state["loss"]) and state["tuple"] == [1, 2]


def test_wrong_arguments(tmp_path):
    for options, words in (({"storage": "tape"}, "tape"), ({"keep": 0}, "keep=0"), ({"keep": -1}, "keep=-1")):
        with pytest.raises(InputError, match=words):
            write(tmp_path, 1, **options)
    with pytest.raises(InputError, match="step=-1"):
        write(tmp_path, -1, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("storage", STORAGES)
def test_a_checkpoint_of_nothing(tmp_path, storage):
    save(tmp_path, 0, [], {"a": 1}, Mesh(), storage=storage)
    found = open_checkpoint(tmp_path)
    assert (found.step, found.state, found.tensors, found.verify()) == (0, {"a": 1}, {}, [])


def test_keep(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step, keep=None)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_00000003", "step_00000002", "step_00000001"]
    write(tmp_path, 4, keep=3)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_00000004", "step_00000003", "step_00000002"]
    write(tmp_path, 1, keep=2)  # a run that went back to an earlier step: what was saved last is newest
    assert [p.name for p in checkpoints(tmp_path)] == ["step_00000001", "step_00000004"]
    assert open_checkpoint(tmp_path).step == 1
    write(tmp_path, 2, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000002"]


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step, keep=None)
    (tmp_path / "step_00000003" / "rank_00000.h5").write_bytes(b"")
    write(tmp_path, 4, keep=2)
    assert {p.name for p in checkpoints(tmp_path)} == {"step_00000002", "step_00000003", "step_00000004"}


def test_the_same_step_again(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    write(tmp_path, 2, 5)
    assert version_at(tmp_path) == 5 and open_checkpoint(tmp_path).step == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001", "step_00000002"]


def test_what_is_read_back_is_compared(tmp_path, monkeypatch):
    """A disk that loses a write: the save fails, and the checkpoint before it stays."""
    write(tmp_path, 1)
    needle = value("model/blocks/1/qkv", 2).tobytes()
    real = os.pwrite

    def lossy(descriptor, data, offset):
        return real(descriptor, bytes(len(data)) if bytes(data) == needle else data, offset)

    monkeypatch.setattr(os, "pwrite", lossy)
    with pytest.raises(CheckpointSaveError, match=r"rank_00000\.h5: model/blocks/1/qkv does not read back"):
        write(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_numbers_that_cannot_be_had(tmp_path, monkeypatch):
    """A GPU that fails while its arrays are copied: no checkpoint, and no crash in HDF5 later."""

    def lost(array):
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(writer, "to_host", lost)
    with pytest.raises(CheckpointSaveError, match=r"rank_00000\.h5: RuntimeError: the device is lost"):
        write(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_is_json(tmp_path):
    path = write(tmp_path, 1)
    content = json.loads((path / "manifest.json").read_text())
    assert content["format"] == "hpcmp-checkpoint" and content["version"] == 2 and content["step"] == 1
    assert re.fullmatch("[0-9a-f]{64}", content["sha256"])
    piece = content["tensors"]["model/blocks/1/up/weight"]["pieces"][0]
    assert sorted(piece) == ["count", "dataset", "digest", "file", "start"]


def test_slabs_may_come_from_a_generator(tmp_path):
    slabs = by_name(list(owned(Mesh(), 8)))
    save(tmp_path, 8, (slabs[name] for name in slabs), STATE, Mesh())
    assert version_at(Path(tmp_path)) == 8
