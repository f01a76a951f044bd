"""manifest.json: what a checkpoint holds and where each byte of it lies, under one digest.

The file is the canonical JSON of its content, with the SHA-256 of the canonical JSON of all the rest: any other text is
refused. The data files are covered by digests in the manifest, every byte once: a piece's numbers by the piece's
digest, all else in a file (what HDF5 keeps there) by the file's. ``algorithm`` names the digest; version 1 had CRC-32.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..plain import read_whole
from . import digest
from .slab import Region, check_tiling

NAME = "manifest.json"
FORMAT = "hpcmp-checkpoint"
VERSION = 2
LIMIT = 64 << 20  # bytes of a manifest: some 400,000 pieces
DEPTH = 32  # of objects and lists within objects and lists in the state: nothing that handles it runs out of stack
DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

_WORD = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"
TENSOR = re.compile(rf"{_WORD}(/{_WORD})*")
DATASET = re.compile(rf"{_WORD}(/{_WORD})*(@[0-9]+)?")
FILE = re.compile(rf"{_WORD}\.h5")
TIME = re.compile("[0-9T:.+-]{1,40}")
STORAGES = ("files", "node", "shared", "mpio")


def on_disk(dtype: str) -> np.dtype[Any]:
    """The dtype as it is in files: little-endian."""
    return np.dtype(dtype).newbyteorder("<")


@dataclass(frozen=True)
class Piece:
    """A region of a tensor, as one rank wrote it: in which dataset of which file; the digest of its C-order bytes."""

    file: str
    dataset: str
    start: tuple[int, ...]
    count: tuple[int, ...]
    digest: str

    @property
    def region(self) -> Region:
        """Where it lies in the tensor."""
        return Region(self.start, self.count)


@dataclass(frozen=True)
class Tensor:
    """A global array: its pieces tile its shape. Numbers are little-endian on disk."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class DataFile:
    """A file's length, where pieces' numbers lie in it as (offset, bytes), and the digest of all its other bytes."""

    bytes: int
    extents: tuple[tuple[int, int], ...]
    digest: str


@dataclass(frozen=True)
class Manifest:
    """step: the optimizer step. saved: when, in UTC. storage: one of STORAGES. state: the caller's, plain JSON.
    algorithm: of the digests.
    """

    step: int
    saved: str
    storage: str
    files: dict[str, DataFile]
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    algorithm: str = digest.ALGORITHM

    def render(self) -> bytes:
        """The text of the file. Raises ValueError if it would be too long, or ``state`` too deep, to be read again."""
        _need(not _deeper(self.state, DEPTH), f"state is nested more than {DEPTH} deep")
        text = _render({"format": FORMAT, "version": VERSION, **asdict(self)})
        if len(text) > LIMIT:
            raise ValueError(
                f"the manifest would have {len(text)} bytes; {LIMIT} is the most: save fewer, larger pieces"
            )
        return text

    @property
    def whole(self) -> bool:
        """Whether each tensor is one dataset of a file that all ranks share, and not a dataset for each piece."""
        return is_whole(self.storage)

    def origin(self, piece: Piece) -> tuple[int, ...]:
        """Where in the tensor the first element of the piece's dataset lies."""
        return (0,) * len(piece.start) if self.whole else piece.start

    def dataset_shape(self, tensor: Tensor, piece: Piece) -> tuple[int, ...]:
        """The shape of the piece's dataset: its own, or the tensor's where all ranks share a file."""
        return tensor.shape if self.whole else piece.count


def is_whole(storage: str) -> bool:
    """Whether ``storage`` keeps each tensor in one dataset."""
    return storage in ("shared", "mpio")


def read(path: Path) -> tuple[Manifest, str]:
    """The manifest in the file ``path``, and the SHA-256 of its text. Raises CheckpointError naming the file."""
    try:
        text = read_whole(path, LIMIT)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    return parse(text, path), hashlib.sha256(text).hexdigest()


def parse(text: bytes, path: Path) -> Manifest:
    """The manifest of which ``text`` is the rendering, checked whole. Raises CheckpointError naming ``path``."""
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError("this is not the manifest of a checkpoint")
        content.pop("sha256", None)
        if _render(content) != text:
            raise ValueError("damaged: the text does not have the digest that is written in it")
        if content["version"] not in (1, VERSION):
            raise ValueError(f"format version {content['version']!r:.40}; this hpcmp reads versions 1 and {VERSION}")
        return _checked(content | {"algorithm": "crc32"} if content["version"] == 1 else content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not of the form of a manifest ({type(error).__name__}: {error})") from None


def _render(content: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, sort_keys=True).encode() + b"\n"


def _checked(content: dict[str, Any]) -> Manifest:
    """Every value of the kind and in the range that the rest of the code relies on."""
    _need(content["storage"] in STORAGES, f"unknown storage {content['storage']!r:.80}")
    _need(content["algorithm"] in digest.DIGITS, f"unknown algorithm {content['algorithm']!r:.80} of digests")
    digests = re.compile(f"[0-9a-f]{{{digest.DIGITS[content['algorithm']]}}}")
    files = {}
    for name, entry in content["files"].items():
        _need(FILE.fullmatch(name), f"{name!r:.80} is not the plain name of a data file")
        extents = []
        end = 0
        for pair in entry["extents"]:
            offset, length = _integers(pair, 2)
            _need(offset >= end, f"{name}: extents overlap")
            end = offset + length
            extents.append((offset, length))
        _need(_integers([entry["bytes"]])[0] >= end, f"{name}: extents end beyond the file")
        files[name] = DataFile(entry["bytes"], tuple(extents), _matched(digests, entry["digest"]))
    tensors = {
        _matched(TENSOR, name): _tensor(name, entry, files, digests) for name, entry in content["tensors"].items()
    }
    used = dict.fromkeys(files, 0)
    for tensor in tensors.values():
        for piece in tensor.pieces:
            used[piece.file] += piece.region.size * tensor.itemsize
    for name, file in files.items():
        _need(used[name] == sum(length for _, length in file.extents), f"{name}: extents and pieces differ in size")
    _need(isinstance(content["state"], dict), "state is not an object")
    _need(not _deeper(content["state"], DEPTH), f"state is nested more than {DEPTH} deep")
    saved = content["saved"]
    _need(isinstance(saved, str) and TIME.fullmatch(saved), "saved is not a text that names a time")
    step = _integers([content["step"]])[0]
    return Manifest(step, saved, content["storage"], files, tensors, content["state"], content["algorithm"])


def _tensor(name: str, entry: dict[str, Any], files: dict[str, DataFile], digests: re.Pattern[str]) -> Tensor:
    shape = _integers(entry["shape"])
    _need(entry["dtype"] in DTYPES, f"{name}: unknown dtype {entry['dtype']!r:.80}")
    pieces = []
    for part in entry["pieces"]:
        start, count = (_integers(part[key], len(shape)) for key in ("start", "count"))
        within = all(0 < n and a + n <= whole for a, n, whole in zip(start, count, shape, strict=True))
        _need(within, f"{name}: a piece lies outside the tensor")
        _need(part["file"] in files, f"{name}: a piece lies in {part['file']!r:.80}, which is not listed")
        pieces.append(
            Piece(part["file"], _matched(DATASET, part["dataset"]), start, count, _matched(digests, part["digest"]))
        )
    try:
        check_tiling(shape, [piece.region for piece in pieces])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return Tensor(shape, entry["dtype"], tuple(pieces))


def _integers(values: Any, length: int | None = None) -> tuple[int, ...]:
    _need(isinstance(values, list) and len(values) <= 32, "not a list of integers")
    _need(length is None or len(values) == length, f"{len(values)} integers where there must be {length}")
    _need(all(type(v) is int and 0 <= v < 2**62 for v in values), "not integers from 0 on")
    return tuple(values)


def _deeper(value: Any, levels: int) -> bool:
    """Whether objects and lists are nested more than ``levels`` deep."""
    level = [value]
    for _ in range(levels + 1):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inner for item in items]
    return bool(level)


def _matched(pattern: re.Pattern[str], value: Any) -> str:
    fits = isinstance(value, str) and pattern.fullmatch(value)
    _need(fits, f"{value!r:.80} is not a name of the form {pattern.pattern}")
    return str(value)


def _need(condition: object, problem: str) -> None:
    if not condition:
        raise ValueError(problem)
