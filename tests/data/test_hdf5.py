"""HDF5 files that are no good: another kind, other types and shapes, or numbers that lie elsewhere."""

from __future__ import annotations

import os
import shutil
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpcmp.data import hdf5
from hpcmp.errors import DataError
from tests.data.reading import everything, refused


def replace(group: Any, name: str, **arguments: Any) -> None:
    """Make a dataset anew with some other property, but the same attributes."""
    attributes = dict(group[name].attrs)
    values = arguments.pop("data", group[name][:])
    del group[name]
    group.create_dataset(name, data=values, **arguments).attrs.update(attributes)


DAMAGE: dict[str, tuple[Callable[[Any], object], str]] = {
    "another format": (lambda f: f.attrs.modify("format", np.bytes_(b"other")), "not a token file of hpcmp"),
    "no format": (lambda f: f.attrs.pop("format"), "not a token file of hpcmp"),
    "a later version": (lambda f: f.attrs.modify("version", 2), "has format version 2"),
    "a version of text": (
        lambda f: f.attrs.create("version", "1"),
        "attribute version is missing, or is not an integer",
    ),
    "an array": (
        lambda f: f.attrs.create("vocabulary", [257]),
        "attribute vocabulary is missing, or is not an integer",
    ),
    "negative": (
        lambda f: f.attrs.create("end_of_document", -1),
        "attribute end_of_document is missing, or is not an integer >= 0",
    ),
    "a float": (lambda f: f.attrs.create("vocabulary", 257.0), "attribute vocabulary is missing, or is not an integer"),
    "a reference": (
        lambda f: f.attrs.create("tokenizer", f.ref, dtype=h5py.ref_dtype),
        "attribute tokenizer is missing, or is not a fixed-length string",
    ),
    "variable length": (
        lambda f: f.attrs.create("tokenizer", "bytes"),
        "attribute tokenizer is missing, or is not a fixed-length string",
    ),
    "bad text": (lambda f: f.attrs.create("tokenizer", np.bytes_(b"\xff")), "tokenizer is not UTF-8"),
    "no vocabulary": (lambda f: f.attrs.pop("vocabulary"), "attribute vocabulary is missing"),
    "a small vocabulary": (lambda f: f.attrs.modify("vocabulary", 256), "end of document 256, vocabulary 256"),
    "a huge vocabulary": (lambda f: f.attrs.modify("vocabulary", 2**31), "vocabulary 2147483648"),
    "no split": (lambda f: f.pop("valid"), "valid/tokens: is not there"),
    "no tokens": (lambda f: f["train"].pop("tokens"), "train/tokens: is not there"),
    "a group": (lambda f: (f["train"].pop("tokens"), f["train"].create_group("tokens")), "train/tokens: not a dataset"),
    "a dataset": (lambda f: (f.pop("train"), f.create_dataset("train", data=[1])), "train/tokens: is not there"),
    "int64": (lambda f: replace(f["train"], "tokens", dtype="<i8"), "tokens: has dtype int64, not <u1 or <u2"),
    "big-endian": (lambda f: replace(f["train"], "tokens", dtype=">u2"), "tokens: has dtype >u2"),
    "float": (lambda f: replace(f["valid"], "tokens", dtype="f4"), "valid/tokens: has dtype float32"),
    "short offsets": (lambda f: replace(f["train"], "documents", dtype="<i4"), "documents: has dtype int32, not <i8"),
    "2-D": (lambda f: replace(f["train"], "tokens", data=f["train/tokens"][:][None]), "has 2 dimensions, not 1"),
    "scalar": (lambda f: replace(f["train"], "tokens", data=np.uint16(3)), "has 0 dimensions, not 1"),
    "fewer tokens": (lambda f: replace(f["train"], "tokens", data=f["train/tokens"][:-1]), "its counts .* differ"),
    "fewer offsets": (lambda f: replace(f["train"], "documents", data=f["train/documents"][:-1]), "counts .* differ"),
    "no offsets": (lambda f: replace(f["train"], "documents", data=f["train/documents"][:0]), "counts .* differ"),
    "a late start": (lambda f: f["train/documents"].write_direct(np.array([5]), dest_sel=np.s_[:1]), "runs from 5"),
    "no storage": (
        lambda f: (lambda n: (f["train"].pop("tokens"), f["train"].create_dataset("tokens", (n,), "<u2")))(
            f["train/tokens"].size
        ),
        "claims [0-9]* bytes, which are not in the file",
    ),
    "a filter plug-in": (
        lambda f: replace(f["train"], "tokens", compression="lzf"),
        "stored through filters, which are not allowed",
    ),
    "no digest": (lambda f: f["train/tokens"].attrs.pop("digest"), "train/tokens: attribute digest is missing"),
    "no tokenizer": (lambda f: f.pop("tokenizer"), "tokenizer: is not there"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_fit_is_refused(damage: str, token_path: Path) -> None:
    change, match = DAMAGE[damage]
    with h5py.File(token_path, "r+") as file:
        change(file)
    refused(token_path, match)


def elsewhere(file: Any, kind: str, other: Path) -> None:
    """Let the training tokens of ``file`` come from ``other``, where the very same tokens are."""
    attributes = dict(file["train/tokens"].attrs)
    tokens = file["train/tokens"][:]
    train = file["train"]
    if kind == "external group":
        del file["train"]
        file["train"] = h5py.ExternalLink(str(other), "/train")
        return
    del train["tokens"]
    match kind:
        case "external link":
            train["tokens"] = h5py.ExternalLink(str(other), "/train/tokens")
        case "soft link":
            file["kept"] = tokens
            train["tokens"] = h5py.SoftLink("/kept")
        case "virtual":
            layout = h5py.VirtualLayout(tokens.shape, tokens.dtype)
            layout[:] = h5py.VirtualSource(str(other), "train/tokens", tokens.shape)
            train.create_virtual_dataset("tokens", layout)
        case "external storage":
            with h5py.File(other) as source:
                first = source["train/tokens"].id.get_offset()
            train.create_dataset("tokens", tokens.shape, tokens.dtype, external=[(str(other), first, tokens.nbytes)])
    if "link" not in kind:
        train["tokens"].attrs.update(attributes)


@pytest.mark.parametrize("kind", ["external link", "external group", "soft link", "virtual", "external storage"])
def test_tokens_that_lie_elsewhere_are_refused(kind: str, token_path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.h5"
    shutil.copy(token_path, other)
    with h5py.File(token_path, "r+") as file:
        elsewhere(file, kind, other)
    with h5py.File(token_path) as file, h5py.File(other) as source:  # HDF5 itself would have read them
        np.testing.assert_array_equal(file["train/tokens"][:], source["train/tokens"][:])
    refused(token_path, "not stored in one piece" if kind in ("virtual", "external storage") else "a link to elsewhere")


def test_compressed_and_chunked_files_are_read(token_path: Path) -> None:
    """As h5repack makes them."""
    expected = everything(token_path)
    with h5py.File(token_path, "r+") as file:
        replace(file["train"], "tokens", chunks=(100,), compression="gzip", shuffle=True, fletcher32=True)
        replace(file["valid"], "documents", chunks=(4,))
    assert everything(token_path) == expected


def test_a_damaged_chunk_names_the_file(token_path: Path) -> None:
    with h5py.File(token_path, "r+") as file:
        replace(file["train"], "tokens", chunks=(100,), fletcher32=True)
        at = file["train/tokens"].id.get_chunk_info(2).byte_offset
    data = bytearray(token_path.read_bytes())
    data[at + 5] ^= 4
    token_path.write_bytes(data)
    refused(
        token_path,
        r"train/tokens\[250:260\]: a damaged chunk: its checksum does not fit",
        on=lambda file: file.split("train").read(250, 10),
    )


PIPELINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "deflate": {"compression": 1},
    "shuffle": {"shuffle": True},
    "checksum": {"fletcher32": True},
    "all": {"compression": 1, "shuffle": True, "fletcher32": True},
}


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("dtype", ["<u1", "<u2", "<u4", "<i8"])
@pytest.mark.parametrize("chunk", [1, 7, 1000, 150_000])
def test_chunks_are_decoded_as_hdf5_does(pipeline: str, dtype: str, chunk: int, tmp_path: Path) -> None:
    numbers = np.random.default_rng(chunk).integers(0, 200, 300 if chunk < 100 else 200_000).astype(dtype)
    numbers[-200:] = 0
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["format"] = np.bytes_(b"x")
        file.create_dataset("a", data=numbers, chunks=(chunk,), **PIPELINES[pipeline])
    with hdf5.open_file(tmp_path / "a.h5", "x") as found:
        column = hdf5.Column(found, "a", (dtype,))
        assert (column.size, column.dtype) == (numbers.size, np.dtype(dtype))
        size = numbers.size
        for start, stop in ((0, size), (0, 0), (size, size), (5, 6), (size - 250, size), (99, 201)):
            np.testing.assert_array_equal(column.read(start, stop), numbers[start:stop])


def bomb(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


CHUNKS: dict[str, tuple[dict[str, Any], bytes, int, str]] = {
    "as it should be": ({"compression": 9}, bomb(32), 0, ""),
    "deflate left out": ({"compression": 9}, bytes(32), 1, ""),
    "a bomb": ({"compression": 9}, bomb(1 << 26)[:1000], 0, "deflate makes more of it than a chunk holds"),
    "a longer bomb": ({"compression": 9}, bomb(1 << 26), 0, "far longer than it should be"),
    "too much": ({"compression": 9}, bomb(33), 0, "has 33 bytes instead of 32"),
    "too little": ({"compression": 9}, bomb(31), 0, "has 31 bytes instead of 32"),
    "cut off": ({"compression": 9}, bomb(32)[:-2], 0, "or comes to no end"),
    "not deflate": ({"compression": 9}, b"\xff" * 20, 0, "a damaged chunk"),
    "longer, without filters": ({}, bytes(1000), 0, "has 1000 bytes instead of 32"),
    "shorter, without filters": ({}, bytes(31), 0, "has 31 bytes instead of 32"),
    "no checksum": ({"fletcher32": True}, bytes(3), 0, "has 0 bytes instead of 32"),
    "a checksum of zeros": ({"fletcher32": True}, bytes(36), 0, ""),
    "another checksum": ({"fletcher32": True}, bytes(35) + b"\1", 0, "its checksum does not fit"),
}


@pytest.mark.parametrize("kind", CHUNKS)
def test_chunks_that_are_not_what_they_say(kind: str, tmp_path: Path) -> None:
    """Refused by whoever reads them, in memory that does not grow with what they would become."""
    options, data, mask, words = CHUNKS[kind]
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.attrs["format"] = np.bytes_(b"x")
        made = file.create_dataset("a", (16,), "<u2", chunks=(16,), **options)
        made.id.write_direct_chunk((0,), data, mask)
    tracemalloc.start()
    with hdf5.open_file(path, "x") as found:
        column = hdf5.Column(found, "a", ("<u2",))
        if words:
            with pytest.raises(DataError, match=rf"{path}: a\[3:5\]: .*{words}"):
                column.read(3, 5)
        else:
            np.testing.assert_array_equal(column.read(3, 5), [0, 0])
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_corpus_that_claims_more_than_the_file_can_hold(token_path: Path) -> None:
    """A terabyte of chunks that nobody wrote: refused at once, not read as zeros."""
    with h5py.File(token_path, "r+") as file:
        attributes = dict(file["train/tokens"].attrs)
        del file["train/tokens"]
        made = file["train"].create_dataset("tokens", (1 << 40,), "<u2", chunks=(1 << 16,), compression="gzip")
        made.attrs.update(attributes)
        file["train"].attrs["tokens"] = 1 << 40
    refused(token_path, "train/tokens: claims 2199023255552 bytes, which are not in the file")


def test_a_chunk_that_is_missing(token_path: Path) -> None:
    with h5py.File(token_path, "r+") as file:
        tokens, attributes = file["train/tokens"][:], dict(file["train/tokens"].attrs)
        del file["train/tokens"]
        made = file["train"].create_dataset("tokens", tokens.shape, tokens.dtype, chunks=(100,), compression="gzip")
        made[100:] = tokens[100:]
        made.attrs.update(attributes)
    refused(token_path, "train/tokens: claims .* which are not in the file")


def test_a_long_tokenizer_is_not_read(token_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["hpcmp.data.tokens"], "TOKENIZER", 4)
    refused(token_path, "tokenizer is longer than 4 bytes", on=lambda file: file.definition)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("pipe", "not a plain file"), (".", "not a plain file"), ("gone", "No such file")):
        refused(tmp_path / name, f"cannot read .*{words}")
