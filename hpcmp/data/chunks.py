"""Chunks of an HDF5 dataset of one dimension, read and decoded here and not by HDF5.

A kilobyte of deflate can say a megabyte, and HDF5 gives its filter memory without end. Here a chunk never becomes
longer than it says. A chunk without filters may claim to be longer than chunks are, and HDF5 2.0 writes all of it to
the memory of one. So HDF5 is asked for nothing but the place of a chunk. Source: the HDF5 library's H5Zdeflate.c,
H5Zshuffle.c, H5Zfletcher32.c and H5checksum.c.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..hdf5 import DEFLATE, FLETCHER32, SHUFFLE
from ..plain import PlainFile


def read(dataset: Any, start: int, stop: int, file: PlainFile) -> NDArray[Any]:
    """``dataset[start:stop]`` of an h5py dataset that ``Hdf5File`` found sound, in ``file``.

    Raises ValueError if a chunk is not what it says, OSError if it cannot be read.
    """
    length = dataset.chunks[0]
    values = np.empty(stop - start, dataset.dtype)
    for first in range(start - start % length, stop, length):
        a, b = max(start, first), min(stop, first + length)
        values[a - start : b - start] = _chunk(dataset, first, file)[a - first : b - first]
    return values


def _chunk(dataset: Any, first: int, file: PlainFile) -> NDArray[Any]:
    """The chunk that begins at element ``first``."""
    place, itemsize = dataset.id.get_chunk_info_by_coord((first,)), dataset.dtype.itemsize
    whole = dataset.chunks[0] * itemsize
    if place.byte_offset is None or place.byte_offset + place.size > file.size or place.size > 2 * whole + 1024:
        raise ValueError(f"the chunk at {first} is not in the file, or far longer than it should be")
    buffer = bytearray(place.size)
    file.read_at(buffer, place.byte_offset)
    data = bytes(buffer)
    plist = dataset.id.get_create_plist()
    for i in reversed(range(plist.get_nfilters())):
        if place.filter_mask >> i & 1:
            continue
        kind = plist.get_filter(i)[0]
        if kind == DEFLATE:
            data = _inflated(data, whole + 4)
        elif kind == SHUFFLE:
            data = _unshuffled(data, itemsize)
        elif kind == FLETCHER32:
            data = _summed(data)
    if len(data) != whole:
        raise ValueError(f"the chunk at {first} has {len(data)} bytes instead of {whole}")
    return np.frombuffer(data, dataset.dtype)


def _inflated(data: bytes, limit: int) -> bytes:
    """What deflate made ``data`` of: at most ``limit`` bytes."""
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise ValueError(f"a damaged chunk: {error}") from None
    if not stream.eof or len(plain) > limit:
        raise ValueError("a damaged chunk: deflate makes more of it than a chunk holds, or comes to no end")
    return plain


def _unshuffled(data: bytes, itemsize: int) -> bytes:
    """``data`` has the first bytes of all elements, then their second bytes, and so on."""
    cut = len(data) - len(data) % itemsize
    return np.frombuffer(data, np.uint8, cut).reshape(itemsize, -1).T.tobytes() + data[cut:]


def _summed(data: bytes) -> bytes:
    """``data`` without its checksum, Fletcher's of 32 bits, which must fit."""
    body, stored = data[:-4], int.from_bytes(data[-4:], "little")
    words = np.frombuffer(body + b"\0" * (len(body) % 2), ">u2").astype(np.uint64)
    weights = (np.arange(len(words), 0, -1, dtype=np.uint64) - 1) % 65535 + 1  # of the second sum, modulo 65535
    high, low = (int(total) and (int(total) - 1) % 65535 + 1 for total in ((weights * words).sum(), words.sum()))
    if high << 16 | low != stored:
        raise ValueError("a damaged chunk: its checksum does not fit")
    return body
