"""Reading pieces from HDF5 files, with suspicion: contiguous datasets of plain numbers, and nothing else."""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from .agree import reason
from .manifest import DataFile, on_disk
from .slab import BLOCK, Region


def measure(path: Path, datasets: Sequence[str]) -> DataFile:
    """What the manifest says of a finished file that holds ``datasets``."""
    with OpenFile(path) as file:
        extents = sorted(file.extent(name) for name in datasets)
    merged: list[tuple[int, int]] = []
    for offset, length in extents:
        if merged and sum(merged[-1]) == offset:
            offset, length = merged[-1][0], merged.pop()[1] + length
        merged.append((offset, length))
    return DataFile(path.stat().st_size, tuple(merged), _rest(path, merged))


def check_size(path: Path, stored: DataFile) -> None:
    """Raise CheckpointError unless ``path`` is a plain file, no link, of the right length."""
    try:
        status = os.lstat(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a plain file")
    if status.st_size != stored.bytes:
        raise CheckpointError(f"{path}: {status.st_size} bytes long instead of {stored.bytes}: truncated or replaced")


def open_checked(path: Path, stored: DataFile) -> OpenFile:
    """The file, if all in it besides the numbers has the digest it was saved with: HDF5 never sees a flipped bit."""
    check_size(path, stored)
    try:
        rest = _rest(path, stored.extents)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if rest != stored.digest:
        raise CheckpointError(f"{path}: damaged: what HDF5 keeps around the tensors has changed since it was saved")
    return OpenFile(path)


def _rest(path: Path, extents: Sequence[tuple[int, int]]) -> str:
    """The CRC-32 of all bytes outside the extents."""
    crc, at = 0, 0
    with open(path, "rb") as file:
        for offset, length in (*extents, (os.fstat(file.fileno()).st_size, 0)):
            file.seek(at)
            while at < offset:
                data = file.read(min(offset - at, BLOCK))
                if not data:
                    raise OSError(0, "shorter than it was a moment ago")
                crc, at = zlib.crc32(data, crc), at + len(data)
            at = offset + length
    return f"{crc:08x}"


class OpenFile:
    """A data file open for reading. Only contiguous datasets of plain numbers that lie in this very file are read.

    Links of any kind but hard ones, external storage, virtual datasets, filters and other types are refused before they
    are followed: an HDF5 file can otherwise ask for any file of the machine. Errors are CheckpointErrors naming file
    and dataset.
    """

    def __init__(self, path: Path) -> None:
        import h5py

        self.path = path
        with self._reading(""):
            self.file = h5py.File(
                path, "r", locking=False
            )  # a committed file never changes, and not all systems can lock

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()

    def read(
        self, name: str, shape: tuple[int, ...], dtype: str, origin: Sequence[int], region: Region
    ) -> Iterator[Any]:
        """(block, its numbers) for the blocks of ``region``, from a dataset of ``shape`` that starts at ``origin``."""
        with self._reading(name):
            dataset = self._dataset(name)
            if dataset.shape != shape or dataset.dtype != on_disk(dtype):
                what = f"{dataset.dtype} {dataset.shape}"
                raise CheckpointError(f"{self.path}: {name}: holds {what}; the manifest says {dtype} {shape}")
            for block in region.blocks(dataset.dtype.itemsize):
                values: NDArray[Any] = np.asarray(dataset[block.relative(origin)])
                yield block, values

    def digest(self, name: str, shape: tuple[int, ...], dtype: str, origin: Sequence[int], region: Region) -> str:
        """The CRC-32 of the region's bytes, in C order."""
        crc = 0
        for _, values in self.read(name, shape, dtype, origin, region):
            crc = zlib.crc32(values, crc)
        return f"{crc:08x}"

    def extent(self, name: str) -> tuple[int, int]:
        """(offset, bytes) of the dataset's numbers in the file."""
        with self._reading(name):
            dataset = self._dataset(name)
            return dataset.id.get_offset(), dataset.id.get_storage_size()

    def _dataset(self, name: str) -> Any:
        import h5py

        found = self.file
        for part in name.split("/"):
            if not isinstance(found, h5py.Group):
                raise ValueError("is not there")
            # By its number: asking h5py whether a name exists would follow a link out of the file.
            if found.id.links.get_info(part.encode()).type != h5py.h5l.TYPE_HARD:
                raise ValueError("a link to elsewhere, which is not allowed")
            found = found[part]
        if not isinstance(found, h5py.Dataset) or found.dtype.kind not in "fiu":
            raise ValueError("not a dataset of numbers")
        plist = found.id.get_create_plist()
        if plist.get_layout() != h5py.h5d.CONTIGUOUS or plist.get_external_count() or plist.get_nfilters():
            raise ValueError("not stored in one piece in this file, which is not allowed")
        if found.id.get_storage_size() != found.size * found.dtype.itemsize or found.id.get_offset() is None:
            raise ValueError("its numbers are not in the file")
        return found

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
            where = f"{self.path}: {name}" if name else str(self.path)
            raise CheckpointError(f"{where}: {reason(error)}") from None
