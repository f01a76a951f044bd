"""Flipped bits, cut, swapped and hostile files: nothing that is wrong is ever loaded."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace

import h5py
import numpy as np
import pytest

from hpcmp.checkpoint import manifest, open_checkpoint, reader
from hpcmp.comm.mesh import Mesh
from hpcmp.errors import CheckpointError
from tests.checkpoint.cases import assert_filled, assert_untouched, targets, value, write

STORAGES = {"files": "rank_00000.h5", "mpio": "tensors.h5"}
FLIPS = 500  # of each storage


@pytest.fixture(params=STORAGES)
def made(request, tmp_path):
    """A checkpoint's directory and its data file, in either storage."""
    path = write(tmp_path, 1, storage=request.param)
    return path, path / STORAGES[request.param]


def refused(path, words="."):
    """Open and load: CheckpointError in one line that names the place, and no array changed. Returns its text."""
    slabs = targets(Mesh())
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(path).load(slabs)
    assert_untouched(slabs)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_flipped_bits(made):
    path, data = made
    draw = random.Random(1)
    files = [data, path / "manifest.json"]
    sizes = [file.stat().st_size for file in files]
    for _ in range(FLIPS):
        file = draw.choices(files, sizes)[0]
        place, mask = draw.randrange(file.stat().st_size), 1 << draw.randrange(8)
        for touch in (refused, lambda _: None):  # and flip it back
            with open(file, "r+b") as stream:
                stream.seek(place)
                byte = stream.read(1)[0]
                stream.seek(place)
                stream.write(bytes([byte ^ mask]))
            touch(path)
    slabs = targets(Mesh())
    open_checkpoint(path).load(slabs)
    assert_filled(slabs, 1)


def flip(file, place):
    with open(file, "r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 16]))


def place_of(data, name):
    with h5py.File(data) as file:
        return file[name].id.get_offset()


def test_a_flip_is_found_by_whoever_needs_any_part_of_the_piece(made):
    path, data = made
    name = "model/blocks/1/up/weight"
    flip(data, place_of(data, name))  # in row 0
    found = open_checkpoint(path)
    row = (slice(4, 5), slice(0, 13))
    with pytest.raises(CheckpointError, match=f"{data}: {name}: damaged"):
        found.read(name, row)
    np.testing.assert_array_equal(found.read(name, row, verify=False), value(name, 1)[row])
    np.testing.assert_array_equal(found.read("model/scale"), value("model/scale", 1))  # the others are as good as ever
    assert found.verify() == [f"{data}: {name}: damaged: its numbers have changed since they were saved"]


def test_every_problem_is_listed(made):
    path, data = made
    for name in ("model/scale", "tokenizer"):
        flip(data, place_of(data, name))
    (path / "stranger").touch()
    problems = open_checkpoint(path).verify()
    assert len(problems) == 3
    assert all(word in " ".join(problems) for word in ("model/scale", "tokenizer", "stranger: not a part"))
    flip(data, 20)
    assert "what HDF5 keeps around the tensors has changed" in open_checkpoint(path).verify()[1]


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_cut_file(made, size):
    path, data = made
    os.truncate(data, size if size >= 0 else data.stat().st_size - 1)
    refused(path, f"{data}: .* bytes long instead of")


def test_files_of_two_steps_mixed(tmp_path):
    one, two = write(tmp_path, 1), write(tmp_path, 2)
    names = [path / "rank_00000.h5" for path in (one, two)]
    assert names[0].stat().st_size == names[1].stat().st_size
    names[0].rename(tmp_path / "swap")
    names[1].rename(names[0])
    (tmp_path / "swap").rename(names[1])
    for path in (one, two):
        refused(path, "damaged")


# What follows has digests that are right: someone made it on purpose.


def forge(path, data, change):
    """Let ``change`` alter the data file, and give the checkpoint the manifest that fits it."""
    found, _ = manifest.read(path / "manifest.json")
    stored = found.files[data.name]
    with h5py.File(data, "r+") as file:
        change(file)
    with open(data, "ab") as stream:
        stream.truncate(max(stored.bytes, stream.tell()))
    forged = replace(stored, bytes=data.stat().st_size, digest=reader._rest(data, stored.extents))
    text = replace(found, files={data.name: forged}).render()
    (path / "manifest.json").write_bytes(text)


NAME = "model/blocks/0/up/weight"


def replaced(make):
    def change(file):
        del file[NAME]
        make(file)

    return change


@pytest.fixture
def secret(tmp_path):
    """A file outside the checkpoint that holds what no checkpoint may show."""
    path = tmp_path / "secret.h5"
    with h5py.File(path, "w") as file:
        file["x"] = np.ones((7, 11), "f4")
    return path


def external_link(secret):
    return replaced(lambda file: file.__setitem__(NAME, h5py.ExternalLink(str(secret), "x")))


def external_group(secret):
    def change(file):
        del file["model/blocks/0"]
        file["model/blocks/0"] = h5py.ExternalLink(str(secret), "/")

    return change


def soft_link(secret):
    return replaced(lambda file: file.__setitem__(NAME, h5py.SoftLink("/optimizer/m/blocks/0/up/weight")))


def virtual(secret):
    def make(file):
        layout = h5py.VirtualLayout((7, 11), "<f4")
        layout[...] = h5py.VirtualSource(secret, "x", (7, 11))
        file.create_virtual_dataset(NAME, layout)

    return replaced(make)


def external_storage(secret):
    return replaced(lambda file: file.create_dataset(NAME, (7, 11), "<f4", external=[(str(secret), 0, 308)]))


def chunked(secret):
    return replaced(lambda file: file.create_dataset(NAME, (7, 11), "<f4", chunks=(7, 11), compression="gzip"))


def unwritten(secret):
    return replaced(lambda file: file.create_dataset(NAME, (7, 11), "<f4"))


def texts(secret):
    return replaced(lambda file: file.create_dataset(NAME, (7, 11), h5py.string_dtype()))


def references(secret):
    return replaced(lambda file: file.create_dataset(NAME, (7, 11), h5py.ref_dtype))


def compound(secret):
    return replaced(lambda file: file.create_dataset(NAME, data=np.zeros((7, 11), [("a", "<f4")])))


def another_shape(secret):
    return replaced(lambda file: file.create_dataset(NAME, data=np.zeros((11, 7), "<f4")))


def another_dtype(secret):
    return replaced(lambda file: file.create_dataset(NAME, data=np.zeros((7, 11), ">f4")))


def a_group(secret):
    return replaced(lambda file: file.create_group(NAME))


def nothing(secret):
    return replaced(lambda file: None)


def no_data(secret):
    return replaced(lambda file: file.create_dataset(NAME, data=h5py.Empty("<f4")))


FORGERIES = {
    external_link: "a link to elsewhere",
    external_group: "a link to elsewhere",
    soft_link: "a link to elsewhere",
    virtual: "not stored in one piece in this file",
    external_storage: "not stored in one piece in this file",
    chunked: "not stored in one piece in this file",
    unwritten: "its numbers are not in the file",
    texts: "not a dataset of numbers",
    references: "not a dataset of numbers",
    compound: "not a dataset of numbers",
    another_shape: r"holds float32 \(11, 7\); the manifest says float32 \(7, 11\)",
    another_dtype: r"holds >f4 \(7, 11\); the manifest says float32 \(7, 11\)",
    a_group: "not a dataset of numbers",
    nothing: ".",  # HDF5's own words
    no_data: ".",
}


@pytest.mark.parametrize("forgery", FORGERIES, ids=lambda forgery: forgery.__name__)
def test_forged_datasets_are_refused(made, secret, forgery, monkeypatch):
    path, data = made
    forge(path, data, forgery(secret))
    opened, real = [], h5py.File
    monkeypatch.setattr(h5py, "File", lambda name, *args, **kw: opened.append(name) or real(name, *args, **kw))
    read = os.stat(secret).st_atime_ns
    refused(path, f"{data}: model/blocks/0/[a-z/]*: {FORGERIES[forgery]}")
    assert opened == [data] and os.stat(secret).st_atime_ns == read
    assert NAME in " ".join(open_checkpoint(path).verify())
    slabs = [slab for slab in targets(Mesh()) if not slab.name.startswith("model/blocks/0/")]
    open_checkpoint(path).load(slabs)  # the forgery is refused, not the file
    assert_filled(slabs, 1)


def test_a_file_that_is_no_hdf5(made):
    path, data = made
    found, _ = manifest.read(path / "manifest.json")
    data.write_bytes(bytes(data.stat().st_size))
    stored = found.files[data.name]
    forged = replace(stored, digest=reader._rest(data, stored.extents))
    (path / "manifest.json").write_bytes(replace(found, files={data.name: forged}).render())
    refused(path, f"{data}: .*")


def test_a_manifest_that_names_a_file_outside(made):
    path, data = made
    content = json.loads((path / "manifest.json").read_text())
    del content["sha256"]
    data.rename(path.parent / "outside.h5")
    content["files"] = {"../outside.h5": content["files"][data.name]}
    for tensor in content["tensors"].values():
        for piece in tensor["pieces"]:
            piece["file"] = "../outside.h5"
    (path / "manifest.json").write_bytes(manifest._render(content))
    refused(path, "not the plain name of a data file")
