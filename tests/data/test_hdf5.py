"""HDF5 files that are no good: another kind, other types and shapes, or numbers that lie elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

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
    "a version of text": (lambda f: f.attrs.create("version", "1"), "version is not an integer"),
    "an array": (lambda f: f.attrs.create("vocabulary", [257]), "vocabulary is not an integer"),
    "negative": (lambda f: f.attrs.create("end_of_document", -1), "end_of_document is not an integer >= 0"),
    "a float": (lambda f: f.attrs.create("vocabulary", 257.0), "vocabulary is not an integer"),
    "a reference": (lambda f: f.attrs.create("tokenizer", f.ref, dtype=h5py.ref_dtype), "not a fixed-length string"),
    "variable length": (lambda f: f.attrs.create("tokenizer", "bytes"), "tokenizer is not a fixed-length string"),
    "bad text": (lambda f: f.attrs.create("tokenizer", np.bytes_(b"\xff")), "tokenizer is not UTF-8"),
    "no vocabulary": (lambda f: f.attrs.pop("vocabulary"), "no attribute vocabulary"),
    "a small vocabulary": (lambda f: f.attrs.modify("vocabulary", 256), "end of document 256, vocabulary 256"),
    "a huge vocabulary": (lambda f: f.attrs.modify("vocabulary", 2**31), "vocabulary 2147483648"),
    "no split": (lambda f: f.pop("valid"), "has no valid"),
    "no tokens": (lambda f: f["train"].pop("tokens"), "has no train/tokens"),
    "a group": (lambda f: (f["train"].pop("tokens"), f["train"].create_group("tokens")), "tokens is not a dataset"),
    "a dataset": (lambda f: (f.pop("train"), f.create_dataset("train", data=[1])), "train is not a group"),
    "int64": (lambda f: replace(f["train"], "tokens", dtype="<i8"), "tokens has dtype int64, not <u1 or <u2"),
    "big-endian": (lambda f: replace(f["train"], "tokens", dtype=">u2"), "tokens has dtype >u2"),
    "float": (lambda f: replace(f["valid"], "tokens", dtype="f4"), "valid/tokens has dtype float32"),
    "short offsets": (lambda f: replace(f["train"], "documents", dtype="<i4"), "documents has dtype int32, not <i8"),
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
        "but storage for fewer",
    ),
    "a filter plug-in": (lambda f: replace(f["train"], "tokens", compression="lzf"), "needs a filter plug-in"),
    "no digest": (lambda f: f["train/tokens"].attrs.pop("digest"), "has no attribute digest at /train/tokens"),
    "no tokenizer": (lambda f: f.pop("tokenizer"), "has no tokenizer"),
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
    refused(token_path, "keeps its numbers" if kind in ("virtual", "external storage") else "is a link to elsewhere")


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
    refused(token_path, r"cannot read .*train/tokens\[250:260\]", on=lambda file: file.split("train").read(250, 10))
