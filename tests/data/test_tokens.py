"""Token files: only whole, self-contained ones are read, and an error names the file and what is wrong."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpcmp.data import TokenFile, prepare
from hpcmp.errors import DataError


def everything(path: Path) -> tuple[Any, ...]:
    """All that a reader can see of a token file."""
    with TokenFile(path) as file:
        file.verify()
        splits = [file.split(name) for name in ("train", "valid")]
        return (
            [s.read(0, len(s)).tobytes() for s in splits],
            [s.offsets(0, s.documents).tobytes() for s in splits],
            [(s.documents, s.bytes, s.digest, str(s.dtype)) for s in splits],
            (file.vocabulary, file.end_of_document, file.definition, file.tokenizer_name, file.inputs, file.counts),
        )


def refused(path: Path, match: str, *, on: Callable[[TokenFile], object] = lambda file: None) -> None:
    """Opening ``path``, or what is done then, raises a DataError of one line that names the file."""
    with pytest.raises(DataError, match=match) as caught, TokenFile(path) as file:
        on(file)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def replace(group: Any, name: str, **arguments: Any) -> None:
    """Make a dataset anew with some other property, but the same attributes."""
    attributes = dict(group[name].attrs)
    values = arguments.pop("data", group[name][:])
    del group[name]
    group.create_dataset(name, data=values, **arguments).attrs.update(attributes)


def test_what_a_token_file_says(token_file: TokenFile) -> None:
    token_file.verify()
    assert (token_file.vocabulary, token_file.end_of_document, token_file.tokenizer_name) == (257, 256, "bytes")
    assert token_file.tokenizer.decode(token_file.split("train").read(0, 8)) == "document"
    assert token_file.split("valid").name.endswith("corpus.h5: valid")
    with pytest.raises(KeyError, match="train and valid, not 'test'"):
        token_file.split("test")


def test_any_slice(token_file: TokenFile, token_path: Path) -> None:
    split = token_file.split("train")
    with h5py.File(token_path, locking=False) as file:
        whole = file["train/tokens"][:]
    for start, count in ((0, 1), (3, 50), (len(split) - 7, 7), (len(split), 0), (0, len(split))):
        tokens = split.read(start, count)
        assert tokens.dtype == np.uint16
        np.testing.assert_array_equal(tokens, whole[start : start + count])
    for start, count in ((-1, 2), (0, -1), (len(split), 1), (0, len(split) + 1)):
        with pytest.raises(IndexError, match="corpus.h5: train has"):
            split.read(start, count)
        with pytest.raises(IndexError, match="documents"):
            split.offsets(start, max(count, split.documents + 1))


READS = """
import re, sys
from hpcmp.data import TokenFile
def done():
    return int(re.search(r"rchar: (\\d+)", open("/proc/self/io").read())[1])
import h5py
before = done()
with TokenFile(sys.argv[1]) as file:
    opened = done()
    file.split("train").read(10_000_000, 64)
    print(opened - before, done() - opened)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts reads by /proc")
def test_a_read_fetches_its_slice_alone(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"0123456789abcdef" * 1_000_000)
    prepare([tmp_path / "text"], tmp_path / "c.h5", held_out=0)  # 32 MB
    done = subprocess.run([sys.executable, "-c", READS, tmp_path / "c.h5"], capture_output=True, text=True, timeout=30)
    opening, reading = map(int, done.stdout.split())
    assert opening < 100_000 and reading < 100_000


def test_one_file_read_by_many_at_once(token_path: Path) -> None:
    files = [TokenFile(token_path) for _ in range(5)]
    assert len({f.split("train").read(5, 20).tobytes() for f in files}) == 1
    for f in files:
        f.close()
        f.close()


def test_cut_short(token_path: Path) -> None:
    whole = token_path.read_bytes()
    for length in {*range(0, len(whole), len(whole) // 40), 1, 7, 8, len(whole) - 2, len(whole) - 1}:
        token_path.write_bytes(whole[:length])
        refused(token_path, "not an HDF5 file" if length < 8 else "truncated or damaged")


def test_every_flipped_bit_is_found_or_means_nothing(token_path: Path) -> None:
    """A bit anywhere in the file: either a DataError, or in a byte that nothing reads (padding between objects)."""
    whole, expected = token_path.read_bytes(), everything(token_path)
    used = 0
    for at in range(0, len(whole), 13):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        token_path.write_bytes(damaged)
        try:
            assert everything(token_path) == expected
        except DataError as error:
            used += 1
            assert str(token_path) in str(error) and "\n" not in str(error)
    assert used > len(whole) / 13 / 4


@pytest.mark.parametrize("name", ["train/tokens", "train/documents", "valid/tokens", "valid/documents"])
def test_verify_finds_every_flipped_bit_in_the_arrays(name: str, token_path: Path) -> None:
    with h5py.File(token_path) as file:
        first, size = file[name].id.get_offset(), file[name].id.get_storage_size()
    whole = token_path.read_bytes()
    for at in range(first, first + size, max(1, size // 50)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        token_path.write_bytes(damaged)
        refused(token_path, "damaged", on=lambda file: file.verify())


def test_a_token_outside_the_vocabulary_is_named(token_path: Path) -> None:
    with h5py.File(token_path, "r+") as file:
        file["train/tokens"][100] = 999
    message = "train/tokens is damaged: token 100 is 999, outside the vocabulary of 257"
    refused(token_path, message, on=lambda file: file.split("train").read(90, 20))
    with TokenFile(token_path) as file:
        assert len(file.split("train").read(101, 20)) == 20  # what is not read is not looked at


def test_offsets_that_do_not_increase(token_path: Path) -> None:
    with h5py.File(token_path, "r+") as file:
        file["train/documents"][3] = file["train/documents"][2]
    refused(token_path, "train/documents is damaged", on=lambda file: file.split("train").offsets(0, 10))


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
    refused(
        token_path, "is a link to elsewhere" if "storage" not in kind and kind != "virtual" else "keeps its numbers"
    )


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


def test_a_changed_tokenizer_is_found(token_path: Path) -> None:
    with h5py.File(token_path, "r+") as file:
        file["tokenizer"][0] = ord("B")
    refused(token_path, "tokenizer is damaged", on=lambda file: file.tokenizer)
    refused(token_path, "tokenizer is damaged", on=lambda file: file.verify())


def test_no_token_file(tmp_path: Path) -> None:
    refused(tmp_path / "gone.h5", "cannot read .*No such file")
    refused(tmp_path, "cannot read .*Is a directory")
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty", "it is empty")
    (tmp_path / "text").write_text("some text, long enough for a signature")
    refused(tmp_path / "text", "not an HDF5 file")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    refused(tmp_path / "other.h5", "not a token file of hpcmp: make one with `hpcmp data prepare`")
