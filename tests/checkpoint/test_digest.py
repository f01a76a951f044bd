"""Digests: right, the same in any blocks, and those of older checkpoints still understood."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest

from hpcmp.checkpoint import digest, manifest, open_checkpoint
from hpcmp.comm.mesh import Mesh
from hpcmp.errors import CheckpointError
from tests.checkpoint.cases import assert_filled, targets, value, write


@pytest.mark.parametrize(
    ("algorithm", "text", "expected"),
    [
        ("crc32", b"", "00000000"),
        ("crc32", b"123456789", "cbf43926"),  # the check value of CRC-32
        ("xxh3_64", b"", "2d06800538d394c2"),  # of xxHash's own test vectors
    ],
)
def test_known_values(algorithm, text, expected):
    running = digest.running(algorithm)
    running.update(text)
    assert running.hexdigest() == expected and len(expected) == digest.DIGITS[algorithm]


@pytest.mark.parametrize("algorithm", digest.DIGITS)
def test_blocks_make_no_difference(algorithm):
    data = np.random.default_rng(1).normal(size=(37, 11)).astype("f4")
    whole, parts, other = (digest.running(algorithm) for _ in range(3))
    whole.update(data)
    for row in data:
        parts.update(row)
    other.update(data[::-1].copy())
    assert whole.hexdigest() == parts.hexdigest() != other.hexdigest()


def test_an_unknown_algorithm():
    with pytest.raises(KeyError):
        digest.running("md5")


def version_1(path):
    """Make the checkpoint at ``path`` what version 1 of the format wrote: CRC-32s, and no algorithm."""
    content = json.loads((path / "manifest.json").read_text())
    del content["sha256"], content["algorithm"]
    (path / "tensors.h5").unlink()
    del content["files"]["tensors.h5"]
    for name, tensor in content["tensors"].items():
        for piece in tensor["pieces"]:
            index = tuple(slice(a, a + n) for a, n in zip(piece["start"], piece["count"], strict=True))
            piece["digest"] = f"{zlib.crc32(value(name, 3)[index].tobytes()):08x}"
    for name, file in content["files"].items():
        text, rest, at = (path / name).read_bytes(), b"", 0
        for offset, length in file["extents"]:
            rest, at = rest + text[at:offset], offset + length
        file["digest"] = f"{zlib.crc32(rest + text[at:]):08x}"
    (path / "manifest.json").write_bytes(manifest._render(content | {"version": 1}))


def test_a_checkpoint_of_version_1_is_read(tmp_path):
    path = write(tmp_path, 1, 3)
    version_1(path)
    found = open_checkpoint(path)
    assert found.manifest.algorithm == "crc32" and found.verify() == []
    slabs = targets(Mesh())
    found.load(slabs)
    assert_filled(slabs, 3)
    data = path / "rank_00000.h5"
    text = bytearray(data.read_bytes())
    text[found.manifest.files[data.name].extents[-1][0]] ^= 1
    data.write_bytes(text)
    with pytest.raises(CheckpointError, match="damaged: its numbers have changed"):
        open_checkpoint(path).load(targets(Mesh()))


def test_an_algorithm_and_its_digests_must_fit(tmp_path):
    path = write(tmp_path, 1)
    for algorithm, words in (("md5", "unknown algorithm 'md5'"), ("crc32", "is not a name of the form")):
        content = json.loads((path / "manifest.json").read_text())
        del content["sha256"]
        text = manifest._render(content | {"algorithm": algorithm})
        with pytest.raises(CheckpointError, match=words):
            manifest.parse(text, path / "manifest.json")
