"""The safetensors format: a header in JSON, then the numbers of every tensor, one tensor after the other.

    8 bytes     the length n of the header, little-endian
    n bytes     {"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..., "__metadata__": {...}}
    the rest    little-endian numbers in C order, without holes; data_offsets count from here

A header is judged whole before anything is made of what it says: every byte of the data belongs to exactly one tensor.
Nothing in the format can be executed. Source: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import dtype_of
from ..errors import CheckpointError, reason
from ..plain import PlainFile, read_whole
from .runs import runs
from .slab import Region

LIMIT = 16 << 20  # bytes of a header: some 100,000 tensors
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"} | {
    f"{kind[0].upper()}{8 * size}": f"{kind}{8 * size}" for kind in ("int", "uint") for size in (1, 2, 4, 8)
}
_METADATA = "__metadata__"

Kind = tuple[tuple[int, ...], np.dtype[Any]]  # a tensor's shape and dtype


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, and the offset in the file at which its numbers begin."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int


class SafetensorsFile:
    """A file open for reading; ``tensors``: name -> Stored. Raises CheckpointError naming the file and what is wrong.

    A link is followed: the caller's path may be one, as in the cache of Hugging Face.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with ExitStack() as stack, _about(path):
            self._file = stack.enter_context(PlainFile(path, links=True))
            length = int.from_bytes(self._bytes(8), "little") if self._file.size >= 8 else 0
            if not 2 <= length <= min(LIMIT, self._file.size - 8):
                raise ValueError(f"truncated, or no safetensors file: there is no header of at most {LIMIT} bytes")
            self.tensors = _tensors(parse(self._bytes(length)), 8 + length, self._file.size)
            stack.pop_all()

    def read(self, name: str, region: Region, shape: tuple[int, ...]) -> NDArray[Any]:
        """The numbers of ``region`` of a tensor that is seen in ``shape``: its own, or another of as many elements.

        Reads only these bytes, each run of them that is contiguous in the file at once.
        """
        tensor = self.tensors[name]
        within = all(
            0 <= a and 0 <= n and a + n <= m for a, n, m in zip(region.start, region.count, shape, strict=True)
        )
        if not within or math.prod(shape) != math.prod(tensor.shape):
            raise ValueError(f"{name}, of shape {tensor.shape}: there is no {region} of it in shape {shape}")
        logical = tensor.dtype.kind == "b"
        data = np.empty(region.count, np.uint8 if logical else tensor.dtype)
        into, at = data.reshape(-1).view(np.uint8).data, 0
        offsets, elements = runs(shape, region)
        with _about(self.path):
            for offset in (tensor.offset + data.itemsize * offsets).tolist() if data.size else ():
                self._file.seek(offset)
                self._file.readinto(into[at : at + elements * data.itemsize])
                at += elements * data.itemsize
        return data != 0 if logical else data

    def _bytes(self, count: int) -> bytes:
        data = bytearray(count)
        self._file.readinto(data)
        return bytes(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def write(path: Path, tensors: Mapping[str, Kind], blocks: Callable[[str], Iterable[NDArray[Any]]]) -> None:
    """Write a new file, and force it to the disk. Raises OSError.

    blocks: from a tensor's name to arrays whose numbers, one array after the other, are the tensor's in C order.
    """
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}  # which is what Hugging Face's loaders ask for
    end = 0
    codes = {dtype_of(name): code for code, name in DTYPES.items()}
    for name, (shape, dtype) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that numbers are aligned
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (_, dtype) in tensors.items():
            for block in blocks(name):
                if block.dtype != dtype:
                    raise ValueError(f"{name}: a block of {block.dtype}, not {dtype}")
                file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
            if file.tell() != 8 + len(text) + header[name]["data_offsets"][1]:
                raise ValueError(f"{name}: its blocks are not all its numbers")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of at most LIMIT bytes. Raises CheckpointError naming the file."""
    with _about(path):
        return parse(read_whole(path, LIMIT, links=True))


def parse(text: bytes) -> dict[str, Any]:
    """A JSON object without a key twice, and without what JSON does not know. Raises ValueError or RecursionError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("damaged: a key is there twice")
        return found

    def refused(word: str) -> None:
        raise ValueError(f"damaged: {word} is no number")

    try:
        content = json.loads(text.decode(), object_pairs_hook=once, parse_constant=refused)
    except json.JSONDecodeError as error:
        raise ValueError(f"damaged: not JSON: {error.msg}") from None
    if not isinstance(content, dict):
        raise ValueError("damaged: not a JSON object")
    return content


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """What is wrong with a file, as a CheckpointError that names it."""
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        why = reason(error)
        raise CheckpointError(why if str(path) in why else f"{path}: {why}") from None


def _tensors(header: dict[str, Any], first: int, size: int) -> dict[str, Stored]:
    """The tensors of a header, checked against the data, bytes ``first`` to ``size`` of the file. Raises ValueError."""
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"damaged: {_METADATA} is not a table of texts")
    places = []
    for name, entry in header.items():
        if not name.isprintable() or not 0 < len(name) <= 512:
            raise ValueError(f"damaged: {name[:64]!r} cannot be a tensor's name")
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"damaged: {name} has not just dtype, shape and data_offsets")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in DTYPES:
            raise ValueError(f"{name}: dtype {str(code)[:32]!r} is not read; these are: {', '.join(DTYPES)}")
        if not _counts(shape, 32) or not _counts(offsets, 2) or len(offsets) != 2:
            raise ValueError(f"damaged: {name}: shape or data_offsets are no lists of counts")
        places.append((*offsets, name, Stored(tuple(shape), dtype_of(DTYPES[code]), first + offsets[0])))
    end = 0
    for begin, stop, name, tensor in sorted(places, key=lambda place: place[:2]):
        if begin != end or stop - begin != math.prod(tensor.shape) * tensor.dtype.itemsize:
            raise ValueError(f"damaged: {name} does not begin where another ends, or is not as long as its shape")
        end = stop
    if end != size - first:
        raise ValueError(f"{size - first} bytes of numbers instead of {end}: truncated or damaged")
    return {name: tensor for _, _, name, tensor in places}


def _counts(values: Any, most: int) -> bool:
    return isinstance(values, list) and len(values) <= most and all(type(v) is int and 0 <= v < 2**56 for v in values)
