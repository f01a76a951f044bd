"""Flipped bits, cut, swapped and hostile files: nothing that is wrong is ever loaded."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest

from hpcmp.checkpoint import manifest, open_checkpoint, reader
from hpcmp.comm.mesh import Mesh
from hpcmp.errors import CheckpointError
from hpcmp.plain import PlainFile
from tests.checkpoint.campaign import flips
from tests.checkpoint.cases import assert_filled, assert_untouched, targets, value, version_at, write
from tests.checkpoint.mutations import INSTEAD
from tests.watch import Watch

pytestmark = pytest.mark.timeout(300)

STORAGES = {"files": "rank_00000.h5", "shared": "tensors.h5"}
FLIPS = 160


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


def test_flipped_bits(tmp_path):
    """In numbers, what HDF5 keeps, manifest and pointer. More: ``python -m tests.checkpoint.campaign flips``."""
    outcomes = flips(FLIPS, 1, tmp_path)
    assert outcomes.total() == 2 * FLIPS and not [key for key in outcomes if key[2] == "WRONG"]
    for storage in STORAGES:
        for region in ("numbers", "HDF5 metadata", "manifest"):  # each flip in what is read is found
            found = {what: count for (s, r, what), count in outcomes.items() if (s, r) == (storage, region)}
            unread = storage == "files" and region == "HDF5 metadata"  # tensors.h5 has them for other programs
            assert set(found) <= {"refused", "the one before"} | ({"equal"} if unread else set()), (region, found)
            assert sum(found.values()) > FLIPS / 8
        assert outcomes[storage, "latest", "equal"] > FLIPS / 8  # it is passed over for what is there


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


def copies(tmp_path):
    """Four checkpoints: two steps of a run, and the same steps of another, with other numbers in files of one size."""
    runs = [tmp_path / "a", tmp_path / "b"]
    made = {(run.name, step): write(run, step, version=10 * i + step) for i, run in enumerate(runs) for step in (1, 2)}
    assert len({(path / "rank_00000.h5").stat().st_size for path in made.values()}) == 1
    return made


@pytest.mark.parametrize("other", [("a", 1), ("b", 2), ("b", 1)])
@pytest.mark.parametrize("name", ["rank_00000.h5", "manifest.json"])
def test_files_of_two_checkpoints_mixed(tmp_path, other, name):
    made = copies(tmp_path)
    path = made["a", 2]
    shutil.copy(made[other] / name, path / name)
    refused(path)
    if name == "manifest.json" and other[1] == 1:
        assert version_at(path.parent) == 1  # it is not taken for step 2
    else:
        refused(path.parent)


@pytest.mark.parametrize("other", [("a", 1), ("b", 1)])
def test_a_checkpoint_under_the_name_of_another_step(tmp_path, other):
    made = copies(tmp_path)
    shutil.rmtree(made["a", 2])
    shutil.copytree(made[other], made["a", 2])
    refused(made["a", 2], "step_00000002: holds step 1: renamed, or mixed with another")
    shutil.copytree(made[other], tmp_path / "a" / "best")
    assert version_at(tmp_path / "a" / "best") == (1 if other == ("a", 1) else 11)  # any other name is no claim


def test_a_checkpoint_of_another_run_is_not_what_latest_names(tmp_path, caplog):
    made = copies(tmp_path)
    shutil.rmtree(made["a", 2])
    shutil.copytree(made["b", 2], made["a", 2])
    open_checkpoint(tmp_path / "a")
    assert "does not name a checkpoint that is there" in caplog.text


def test_ranks_mixed_within_a_checkpoint(tmp_path):
    """The file of one rank in the place of another's: a forger's manifest with two files of one size."""
    path = write(tmp_path, 1)
    content = json.loads((path / "manifest.json").read_text())
    del content["sha256"]
    twin = "rank_00001.h5"
    shutil.copy(path / "rank_00000.h5", path / twin)
    content["files"][twin] = content["files"]["rank_00000.h5"] | {"digest": "0" * 16}
    names = [name for name in content["tensors"] if name.startswith("model/blocks")]
    with pytest.raises(CheckpointError, match="differ in size"):
        for name in names:
            content["tensors"][name]["pieces"][0]["file"] = twin
        manifest.parse(manifest._render(content), path)


@pytest.mark.parametrize("what", ["latest", "manifest.json", "rank_00000.h5"])
@pytest.mark.parametrize("kind", INSTEAD)
def test_something_else_in_the_place_of_a_file(tmp_path, what, kind):
    """Nothing outside the folder is opened, no pipe waited for; what is still whole is found."""
    root, outside = tmp_path / "run", tmp_path / "outside"
    write(root, 1)
    write(root, 2)
    shutil.copytree(root, outside)
    for file in (outside / "step_00000002").iterdir():
        shutil.copy(file, outside / file.name)
    path = root / what if what == "latest" else root / "step_00000002" / what
    path.unlink()
    with Watch(outside, outside / "step_00000002") as watch:
        INSTEAD[kind](path, outside)
        assert version_at(root) == (2 if what == "latest" else 1)
        if what != "latest":
            refused(root / "step_00000002", what)
        assert not watch.opened()


class Planted:
    """Unpickled, it makes a folder."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("what", ["latest", "manifest.json", "rank_00000.h5", "tensors.h5"])
def test_a_pickle_is_not_loaded(tmp_path, what):
    write(tmp_path, 1)
    write(tmp_path, 2)
    path = tmp_path / what if what == "latest" else tmp_path / "step_00000002" / what
    text, planted = pickle.dumps(Planted(tmp_path / "planted")), tmp_path / "planted"
    pickle.loads(text)
    planted.rmdir()
    path.write_bytes(text.ljust(path.stat().st_size, b"\0"))
    if what == "rank_00000.h5":
        refused(tmp_path / "step_00000002", what)
    else:
        assert version_at(tmp_path) == (1 if what == "manifest.json" else 2)
    assert not planted.exists()


def test_a_link_to_a_folder_elsewhere(tmp_path):
    root, outside = tmp_path / "run", tmp_path / "outside"
    write(root, 1)
    write(root, 2)
    shutil.move(root / "step_00000002", outside)
    (root / "step_00000002").symlink_to(outside)
    with Watch(outside) as watch:
        assert version_at(root) == 1
        assert not watch.opened()


# What follows has digests that are right: someone made it on purpose.


def rest(data, stored):
    """The digest of what HDF5 keeps in a data file."""
    with PlainFile(data) as plain:
        return reader.rest(plain, stored.extents)


def forge(path, data, change):
    """Let ``change`` alter the data file, and give the checkpoint the manifest that fits it."""
    found, _ = manifest.read(path / "manifest.json")
    stored = found.files[data.name]
    with h5py.File(data, "r+") as file:
        change(file)
    with open(data, "ab") as stream:
        stream.truncate(max(stored.bytes, stream.tell()))
    forged = replace(stored, bytes=data.stat().st_size, digest=rest(data, stored))
    text = replace(found, files=found.files | {data.name: forged}).render()
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
    path = tmp_path / "outside" / "secret.h5"
    path.parent.mkdir()
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
    unwritten: "claims 308 bytes, which are not in the file",
    texts: "not a dataset of plain numbers",
    references: "not a dataset of plain numbers",
    compound: "not a dataset of plain numbers",
    another_shape: r"holds float32 \(11, 7\); the manifest says float32 \(7, 11\)",
    another_dtype: r"holds >f4 \(7, 11\); the manifest says float32 \(7, 11\)",
    a_group: "not a dataset",
    nothing: "is not there",
    no_data: "holds nothing",
}


@pytest.mark.parametrize("forgery", FORGERIES, ids=lambda forgery: forgery.__name__)
def test_forged_datasets_are_refused(made, secret, forgery):
    path, data = made
    forge(path, data, forgery(secret))
    with Watch(secret.parent) as watch:
        refused(path, f"{data}: model/blocks/0/[a-z/]*: {FORGERIES[forgery]}")
        assert NAME in " ".join(open_checkpoint(path).verify())
        assert not watch.opened()
    slabs = [slab for slab in targets(Mesh()) if not slab.name.startswith("model/blocks/0/")]
    open_checkpoint(path).load(slabs)  # the forgery is refused, not the file
    assert_filled(slabs, 1)


def test_a_file_that_is_no_hdf5(made):
    path, data = made
    found, _ = manifest.read(path / "manifest.json")
    data.write_bytes(bytes(data.stat().st_size))
    stored = found.files[data.name]
    forged = replace(stored, digest=rest(data, stored))
    (path / "manifest.json").write_bytes(replace(found, files=found.files | {data.name: forged}).render())
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
