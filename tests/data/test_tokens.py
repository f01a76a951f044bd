"""Token files: only whole, self-contained ones are read, and an error names the file and what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcmp.data import TokenFile, prepare
from hpcmp.errors import DataError
from tests.data.reading import everything, refused


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


@pytest.mark.fault(20)
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


def test_a_changed_tokenizer_is_found(token_path: Path) -> None:
    with h5py.File(token_path, "r+") as file:
        file["tokenizer"][0] = ord("B")
    refused(token_path, "tokenizer is damaged", on=lambda file: file.tokenizer)
    refused(token_path, "tokenizer is damaged", on=lambda file: file.verify())


def test_no_token_file(tmp_path: Path) -> None:
    refused(tmp_path / "gone.h5", "cannot read .*No such file")
    refused(tmp_path, "cannot read .*not a plain file")
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty", "it is empty")
    (tmp_path / "text").write_text("some text, long enough for a signature")
    refused(tmp_path / "text", "not an HDF5 file")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    refused(tmp_path / "other.h5", "not a token file of hpcmp: make one with `hpcmp data prepare`")
