"""The manifest: a text that is either exactly what was written, or refused."""

from __future__ import annotations

import json
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from hpcmp.checkpoint import manifest, open_checkpoint
from hpcmp.checkpoint.manifest import DataFile, Manifest, Piece, Tensor
from hpcmp.errors import CheckpointError
from tests.checkpoint.cases import write

PATH = Path("run/step_00000007/manifest.json")
A = Tensor(
    (4, 6), "float32", (Piece("a.h5", "a", (0, 0), (4, 2), "0" * 16), Piece("b.h5", "a", (0, 2), (4, 4), "1" * 16))
)
FILES = {"a.h5": DataFile(1000, ((100, 16), (200, 16)), "2" * 16), "b.h5": DataFile(500, ((0, 64),), "3" * 16)}
GOOD = Manifest(7, "2026-01-01T00:00:00.000000+00:00", "files", FILES, {"a": A}, {"x": [1, 2.5, None, "ü"]})


def test_round_trip():
    assert manifest.parse(GOOD.render(), PATH) == GOOD


def test_every_flipped_bit_is_refused():
    text = GOOD.render()
    for at in range(len(text)):
        for bit in random.Random(at).sample(range(8), 3):
            flipped = bytearray(text)
            flipped[at] ^= 1 << bit
            with pytest.raises(CheckpointError, match="manifest.json"):
                manifest.parse(bytes(flipped), PATH)


@pytest.mark.parametrize("cut", [0, 1, 100, -1, -2])
def test_a_cut_manifest_is_refused(cut):
    with pytest.raises(CheckpointError):
        manifest.parse(GOOD.render()[:cut], PATH)


def with_piece(**changes: object) -> Manifest:
    pieces = (replace(A.pieces[0], **changes), A.pieces[1])
    return replace(GOOD, tensors={"a": replace(A, pieces=pieces)})


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (replace(GOOD, files={"../a.h5": FILES["a.h5"], "b.h5": FILES["b.h5"]}), "not the plain name"),
        (replace(GOOD, files={"/etc/a.h5": FILES["a.h5"], "b.h5": FILES["b.h5"]}), "not the plain name"),
        (replace(GOOD, files={"a.h5\n": FILES["a.h5"], "b.h5": FILES["b.h5"]}), "not the plain name"),
        (with_piece(file="../../secret.h5"), "not listed"),
        (with_piece(file="b.h5"), "differ in size"),
        (with_piece(dataset="../x"), "not a name"),
        (with_piece(dataset="/x"), "not a name"),
        (with_piece(digest="nonsense"), "not a name"),
        (with_piece(start=(0, 1)), "overlap"),
        (with_piece(count=(4, 1)), "only 20 of 24"),
        (with_piece(count=(4, 7)), "outside"),
        (with_piece(start=(-1, 0)), "not integers"),
        (with_piece(start=(0,)), "1 integers where there must be 2"),
        (with_piece(start=(0, True)), "not integers"),
        (replace(GOOD, tensors={"a": replace(A, dtype="object")}), "unknown dtype"),
        (replace(GOOD, tensors={"../a": A}), "not a name"),
        (replace(GOOD, tensors={"a": replace(A, shape=(2**61, 2**61))}), "only 24 of"),
        (replace(GOOD, files=FILES | {"a.h5": DataFile(100, ((100, 16), (200, 16)), "2" * 16)}), "beyond the file"),
        (replace(GOOD, files=FILES | {"a.h5": DataFile(1000, ((100, 16), (90, 16)), "2" * 16)}), "extents overlap"),
        (replace(GOOD, step=-1), "not integers"),
        (replace(GOOD, step="7"), "not integers"),
        (replace(GOOD, state=[]), "state is not an object"),
        (replace(GOOD, saved=3), "saved is not a text"),
        (replace(GOOD, storage="cloud"), "unknown storage"),
        (replace(GOOD, tensors=[]), "not of the form"),
        (replace(GOOD, files={"a.h5": 3}), "not of the form|subscriptable"),
    ],
)
def test_a_wrong_manifest_with_a_right_digest_is_refused(bad, words):
    try:
        text = bad.render()
    except TypeError:  # dataclasses.asdict leaves what is no dataclass as it is
        raise AssertionError("the case itself is wrong") from None
    with pytest.raises(CheckpointError, match=words) as caught:
        manifest.parse(text, PATH)
    assert "\n" not in str(caught.value)


def test_another_version_and_another_format_say_so():
    content = json.loads(GOOD.render())
    del content["sha256"]
    for changes, words in (({"version": 3}, "format version 3"), ({"format": "npz"}, "not the manifest")):
        with pytest.raises(CheckpointError, match=words):
            manifest.parse(manifest._render(content | changes), PATH)
    with pytest.raises(CheckpointError, match="not of the form"):
        manifest.parse(manifest._render({"format": manifest.FORMAT, "version": 2}), PATH)


@pytest.mark.parametrize("text", [b"", b"null", b"[" * 200_000, b'{"a":' * 100_000, b"\xff\xfe\x00", b"1" * 10_000])
def test_texts_that_are_no_manifest(text):
    with pytest.raises(CheckpointError, match="manifest.json"):
        manifest.parse(text, PATH)


def test_a_huge_manifest_is_refused_before_it_is_read(tmp_path):
    path = write(tmp_path, 1)
    with open(path / "manifest.json", "r+b") as file:
        file.truncate(10 << 30)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"manifest\.json: not a file of at most"):
        open_checkpoint(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_manifest_that_could_not_be_read_again_is_not_written(monkeypatch):
    monkeypatch.setattr(manifest, "LIMIT", 100)
    with pytest.raises(ValueError, match="fewer, larger pieces"):
        GOOD.render()
