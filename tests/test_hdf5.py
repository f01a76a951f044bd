"""HDF5 files from elsewhere: what is read, and that all else is refused without being followed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpcmp.errors import DataError
from hpcmp.hdf5 import CHUNK, FILTERS, Hdf5File
from hpcmp.plain import PlainFile
from tests.checkpoint.mutations_hdf5 import STRUCTURES, lookup3, resealed
from tests.watch import Watch

ROOT = Path(__file__).resolve().parents[1]
NAME = "a/b/numbers"
NUMBERS = np.arange(77, dtype="<f4").reshape(7, 11)
READ = {
    *("the same", "flat", "another shape", "another dtype", "big-endian", "a scalar", "shape zero", "a named type"),
    "strange attributes",
}
READ_IN_CHUNKS = {
    "chunked",
    "filters",
    "resizable",
    "long chunks",
    "short chunks",
    "deflate left out",
    "deflate cut off",
}
READ_IN_CHUNKS |= {"deflate that is none", "a bomb"}  # whoever reads them decodes them, with limits: data/chunks.py


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "numbers.h5"
    with h5py.File(path, "w") as file:
        file[NAME] = NUMBERS
        file["text"] = 1
    return path


@pytest.fixture
def outside(tmp_path: Path, path: Path) -> Path:
    """The very same file, elsewhere."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "outside" / path.name


def opened(path: Path) -> Hdf5File:
    return Hdf5File(PlainFile(path), DataError)


def refused(path: Path, use: Callable[[Hdf5File], object], words: str = ".") -> None:
    with opened(path) as file, pytest.raises(DataError, match=words) as caught:
        use(file)
    assert str(path) in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("filters", [None, FILTERS], ids=["contiguous", "chunked"])
@pytest.mark.parametrize("kind", STRUCTURES)
def test_datasets(kind: str, filters: Any, path: Path, outside: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file[NAME]
        STRUCTURES[kind](file, NAME, NUMBERS, outside)
    with Watch(outside.parent) as watch:
        if kind in READ or (filters and kind in READ_IN_CHUNKS):
            with opened(path) as found:
                found.dataset(NAME, filters)
        else:
            refused(path, lambda found: found.dataset(NAME, filters), NAME)
        assert not watch.opened()


def test_the_watch_sees_what_hdf5_opens(path: Path, outside: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file[NAME]
        STRUCTURES["external link"](file, NAME, NUMBERS, outside)
    with Watch(outside.parent) as watch, h5py.File(path) as file:
        assert not watch.opened()
        assert file[NAME].shape == NUMBERS.shape
        assert watch.opened() == {str(outside)}


def test_limits(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.create_dataset("whole", data=np.zeros(CHUNK, "u1"), chunks=(CHUNK,), compression="gzip")
        file.create_dataset("long", data=np.zeros(CHUNK + 1, "u1"), chunks=(CHUNK + 1,), compression="gzip")
    with opened(path) as found:
        found.dataset("whole", FILTERS)
    refused(path, lambda file: file.dataset("long", FILTERS), f"long: stored in chunks of more than {CHUNK} bytes")


def test_numbers_that_would_lie_beyond_the_end(path: Path) -> None:
    with h5py.File(path) as file:
        at = file[NAME].id.get_offset()
    data = bytearray(path.read_bytes())
    place = data.index(at.to_bytes(8, "little"))
    data[place : place + 8] = (len(data) - 50).to_bytes(8, "little")
    path.write_bytes(data)
    refused(path, lambda file: file.dataset(NAME), "claims 308 bytes|invalid dataset size")  # HDF5 2 sees it first


ATTRIBUTES: dict[str, tuple[Any, str]] = {
    "number": (3, "integer"),
    "largest": (np.uint64(2**64 - 1), "integer"),
    "negative": (-1, ""),
    "float": (1.0, ""),
    "array": ([1, 2], ""),
    "empty": (h5py.Empty("i8"), ""),
    "boolean": (True, ""),
    "text": (np.bytes_("wörter".encode()), "text"),
    "variable": ("text", ""),
    "bad": (np.bytes_(b"\xff"), ""),
    "long": (np.bytes_(b"x" * 64_000), "text"),
    "compound": (np.zeros((), [("a\n", "i4")]), ""),
}


@pytest.mark.parametrize("name", [*ATTRIBUTES, "missing"])
def test_attributes(name: str, path: Path) -> None:
    value, kind = ATTRIBUTES.get(name, (None, ""))
    with h5py.File(path, "r+") as file:
        if name in ATTRIBUTES:
            file["a/b"].attrs[name] = value
    with opened(path) as found:
        if kind == "integer":
            assert found.integer("a/b", name) == int(value)
        if kind == "text":
            assert found.text("a/b", name) == value.decode()
    if kind != "integer":
        refused(path, lambda file: file.integer("a/b", name), f"a/b: attribute {name} is missing, or is not an integer")
    if kind != "text":
        refused(path, lambda file: file.text("a/b", name), f"a/b: attribute {name} is")


def test_files_that_are_none(path: Path) -> None:
    for data, words in ((b"", "not an HDF5 file: it is empty"), (b"x" * 1000, "not an HDF5 file$")):
        path.write_bytes(data)
        with pytest.raises(DataError, match=words):
            opened(path)


def test_a_file_that_is_cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{path}: truncated or damaged: "):
        opened(path)


def test_errors_of_the_disk_are_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: PlainFile, buffer: Any) -> int:
        raise OSError(5, "Input/output error")

    with opened(path) as found:
        numbers = found.dataset(NAME)
        monkeypatch.setattr(PlainFile, "readinto", broken)
        with pytest.raises(DataError, match=f"^{path}: here: Input/output error$"), found.at("here"):
            numbers[...]


def test_no_plug_ins_and_a_file_left_open(path: Path) -> None:
    """A process that forgets to close a file, and has it in a cycle, ends like any other."""
    program = f"""
import pathlib, h5py
from hpcmp.errors import DataError
from hpcmp.hdf5 import Hdf5File
from hpcmp.plain import PlainFile
assert h5py.h5pl.size() > 0
file = Hdf5File(PlainFile(pathlib.Path({str(path)!r})), DataError)
assert h5py.h5pl.size() == 0
print(file.dataset({NAME!r})[1, 1])
kept = [file, file.dataset({NAME!r})]
kept.append(kept)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "12.0\n", "")


def test_checksums_as_hdf5_makes_them(path: Path) -> None:
    """What the fuzz targets use: the checksums of an untouched file are what they are."""
    with h5py.File(path, "w", libver="latest") as file:
        file.create_group("a").attrs["x"] = np.arange(50)
    good = path.read_bytes()
    assert resealed(good) == good and lookup3(b"") == 0xDEADBEEF
    bad = bytearray(good)
    bad[good.index(b"OHDR") + 30] ^= 1
    assert resealed(bytes(bad)) not in (good, bytes(bad))
