"""Reading pieces from a checkpoint's data files: what the manifest says and nothing else, checked before use."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError, reason
from ..hdf5 import Hdf5File
from ..plain import PlainFile
from . import digest
from .manifest import DataFile, on_disk
from .slab import Region

_CHUNK = 1 << 20  # bytes that are in hand at once, of what HDF5 keeps around the numbers


def measure(path: Path, datasets: Sequence[str]) -> DataFile:
    """What the manifest says of a finished file that holds ``datasets``."""
    with OpenFile(path) as file:
        extents = sorted(file.extent(name) for name in datasets)
    merged: list[tuple[int, int]] = []
    for offset, length in extents:
        if merged and sum(merged[-1]) == offset:
            offset, length = merged[-1][0], merged.pop()[1] + length
        merged.append((offset, length))
    with _plain(path) as plain:
        return DataFile(plain.size, tuple(merged), rest(plain, merged))


def check_size(path: Path, stored: DataFile) -> None:
    """Raise CheckpointError unless ``path`` is a plain file, no link, of the right length. Opens nothing."""
    try:
        status = os.lstat(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a plain file")
    if status.st_size != stored.bytes:
        raise CheckpointError(f"{path}: {status.st_size} bytes long instead of {stored.bytes}: truncated or replaced")


def open_checked(path: Path, stored: DataFile, algorithm: str = digest.ALGORITHM) -> OpenFile:
    """The file, if all in it besides the numbers has the digest it was saved with: HDF5 never sees a flipped bit.

    algorithm: of the checkpoint's digests.
    """
    check_size(path, stored)
    plain = _plain(path)
    try:
        found = rest(plain, stored.extents, algorithm)
        if plain.size != stored.bytes or found != stored.digest:
            raise CheckpointError(f"{path}: damaged: what HDF5 keeps around the tensors has changed since it was saved")
        return OpenFile(plain, algorithm)
    except BaseException as error:
        plain.close()
        if isinstance(error, OSError):
            raise CheckpointError(reason(error)) from None
        raise


def rest(file: PlainFile, extents: Sequence[tuple[int, int]], algorithm: str = digest.ALGORITHM) -> str:
    """The digest of all bytes of a file outside the extents. Raises OSError."""
    running, at = digest.running(algorithm), 0
    buffer = memoryview(bytearray(min(_CHUNK, file.size)))
    for offset, length in (*extents, (file.size, 0)):
        file.seek(at)
        while at < offset:
            part = buffer[: min(offset - at, _CHUNK)]
            at += file.readinto(part)
            running.update(part)
        at = offset + length
    return running.hexdigest()


def _plain(path: Path) -> PlainFile:
    try:
        return PlainFile(path)
    except OSError as error:
        raise CheckpointError(reason(error)) from None


class OpenFile(Hdf5File):
    """A data file open for reading: of ``Hdf5File`` only contiguous datasets of numbers that lie in this very file.

    algorithm: of the digests. Raises CheckpointErrors naming file and dataset.
    """

    def __init__(self, file: PlainFile | Path, algorithm: str = digest.ALGORITHM) -> None:
        self.algorithm = algorithm
        super().__init__(_plain(file) if isinstance(file, Path) else file, CheckpointError)

    def read(
        self, name: str, shape: tuple[int, ...], dtype: str, origin: Sequence[int], region: Region
    ) -> Iterator[Any]:
        """(block, its numbers) for the blocks of ``region``, from a dataset of ``shape`` that starts at ``origin``.

        The next block is read into the same array.
        """
        dataset = self.dataset(name)
        if dataset.shape != shape or dataset.dtype != on_disk(dtype):
            what = f"{dataset.dtype} {dataset.shape}"
            raise CheckpointError(f"{self.path}: {name}: holds {what}; the manifest says {dtype} {shape}")
        values: NDArray[Any] = np.empty((), dataset.dtype)
        for block in region.blocks(dataset.dtype.itemsize):
            if values.shape != block.count:  # else the same memory again: new pages cost more than the copy
                values = np.empty(block.count, dataset.dtype)
            with self.at(name):
                if shape:
                    dataset.read_direct(values, block.relative(origin))
                else:
                    values[()] = dataset[()]
            yield block, values

    def digest(self, name: str, shape: tuple[int, ...], dtype: str, origin: Sequence[int], region: Region) -> str:
        """The digest of the region's bytes, in C order."""
        running = digest.running(self.algorithm)
        for _, values in self.read(name, shape, dtype, origin, region):
            running.update(values)
        return running.hexdigest()

    def extent(self, name: str) -> tuple[int, int]:
        """(offset, bytes) of the dataset's numbers in the file."""
        dataset = self.dataset(name)
        with self.at(name):
            return dataset.id.get_offset(), dataset.id.get_storage_size()
