"""Reading pieces from a checkpoint's data files: what the manifest says and nothing else, checked before use."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, array_module
from ..errors import CheckpointError, reason
from ..hdf5 import Hdf5File
from ..plain import PlainFile
from . import digest
from .manifest import DataFile, on_disk
from .runs import runs, widened
from .slab import Region

_CHUNK = 1 << 20  # bytes that are in hand at once, of what HDF5 keeps around the numbers
_EDGE = 64 << 10  # bytes to either side of where a dataset begins, in which HDF5 may have looked
_RUN = 4 << 10  # bytes: runs shorter than this are read with all that lies between them


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
        while at < offset:
            part = buffer[: min(offset - at, _CHUNK)]
            file.read_at(part, at)
            running.update(part)
            at += len(part)
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
        self._memory: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._places: dict[tuple[str, tuple[int, ...], str], int] = {}
        super().__init__(_plain(file) if isinstance(file, Path) else file, CheckpointError)

    def look_up(self, datasets: Iterable[tuple[str, tuple[int, ...], str]]) -> None:
        """Find datasets of (name, shape, dtype) before any numbers are read: these are then read twice as fast.

        What is not as it should be raises nothing here, but when it is read.
        """
        for item in datasets:
            with suppress(CheckpointError):
                # What the system keeps of the places where HDF5 looked, between the numbers, cuts large reads of these
                # into pieces, and its memory for them into small pages. It is told to forget it.
                start = max(0, self._place(*item) - _EDGE)
                os.posix_fadvise(self.plain.fileno(), start, 2 * _EDGE, os.POSIX_FADV_DONTNEED)

    def read(
        self, name: str, shape: tuple[int, ...], dtype: str, origin: Sequence[int], region: Region
    ) -> Iterator[Any]:
        """(block, its numbers) for the blocks of ``region``, from a dataset of ``shape`` that starts at ``origin``.

        The next block is read into the same memory, also that of another dataset.
        """
        offset, kind, wanted = self._place(name, shape, dtype), on_disk(dtype), region.moved(origin)
        cover = widened(shape, wanted, _RUN // kind.itemsize)
        for block in cover.blocks(kind.itemsize):
            if part := block.intersection(wanted):
                size = block.size * kind.itemsize
                if self._memory.size < size:
                    self._memory = np.empty(size, np.uint8)  # kept: new pages cost more than the copy
                values: Any = self._memory[:size].view(kind).reshape(block.count)
                self._fetch(name, values, offset, shape, block)
                yield part.moved([-o for o in origin]), values[(*part.relative(block.start), ...)]

    def fill(
        self, target: Array, name: str, shape: tuple[int, ...], dtype: str, origin: Sequence[int], region: Region
    ) -> None:
        """Read the region into ``target``, an array of its shape, NumPy's or CuPy's, whose dtype may be another."""
        xp, wanted = array_module(target), region.moved(origin)
        straight = xp is np and target.dtype == on_disk(dtype) and target.flags.c_contiguous
        if straight and widened(shape, wanted, _RUN // target.dtype.itemsize) == wanted:
            self._fetch(name, target, self._place(name, shape, dtype), shape, wanted)
            return
        for block, values in self.read(name, shape, dtype, origin, region):
            target[block.relative(region.start)] = xp.asarray(values)

    def digest(self, name: str, shape: tuple[int, ...], dtype: str, origin: Sequence[int], region: Region) -> str:
        """The digest of the region's bytes, in C order."""
        running = digest.running(self.algorithm)
        for _, values in self.read(name, shape, dtype, origin, region):
            running.update(np.ascontiguousarray(values))
        return running.hexdigest()

    def extent(self, name: str) -> tuple[int, int]:
        """(offset, bytes) of the dataset's numbers in the file."""
        dataset = self.dataset(name)
        with self.at(name):
            return dataset.id.get_offset(), dataset.id.get_storage_size()

    def _place(self, name: str, shape: tuple[int, ...], dtype: str) -> int:
        """Where in the file the numbers of a dataset begin, which must be of this shape and dtype."""
        item = name, shape, dtype
        if item not in self._places:
            dataset = self.dataset(name)
            if dataset.shape != shape or dataset.dtype != on_disk(dtype):
                what = f"{dataset.dtype} {dataset.shape}"
                raise CheckpointError(f"{self.path}: {name}: holds {what}; the manifest says {dtype} {shape}")
            self._places[item] = dataset.id.get_offset() or 0
        return self._places[item]

    def _fetch(self, name: str, values: Any, offset: int, shape: tuple[int, ...], block: Region) -> None:
        """Read a block of a dataset that begins at ``offset`` into an array in C order, run by run."""
        starts, length = runs(shape, block)
        view, run = values.reshape(-1).view(np.uint8), length * values.dtype.itemsize
        with self.at(name):
            for i, start in enumerate(starts):
                self.plain.read_at(view[i * run : (i + 1) * run], offset + int(start) * values.dtype.itemsize)
