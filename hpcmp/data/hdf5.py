"""Token files as HDF5: their mark, and columns of numbers. What HDF5 is not trusted with is in ``hpcmp.hdf5``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, reason
from ..hdf5 import FILTERS, Hdf5File
from ..plain import PlainFile
from . import chunks

BLOCK = 1 << 20  # elements read or written at once where a whole column is gone through


def open_file(path: Path, kind: str) -> Hdf5File:
    """``path`` opened for reading, if its root attribute ``format`` is ``kind``; raises DataError if it is not."""
    try:
        plain = PlainFile(path, links=True)
    except OSError as error:
        raise DataError(f"cannot read {reason(error)}") from None
    file = Hdf5File(plain, DataError)
    try:
        if file.attribute("", "format") != kind.encode():
            what = "an HDF5 file, but not a token file of hpcmp"
            raise DataError(f"{path} is {what}: make one with `hpcmp data prepare`")
    except BaseException:
        file.close()
        raise
    return file


class Column:
    """The numbers ``name`` of a file: one dimension, of one of ``dtypes``, all in the file itself; ``size`` of them.

    Contiguous as they are written, or in chunks as other tools make them. Raises DataError naming file and place.
    """

    def __init__(self, file: Hdf5File, name: str, dtypes: tuple[str, ...]) -> None:
        self._file, self._name = file, name
        self._dataset = file.dataset(name, FILTERS)
        self.dtype: np.dtype[Any] = self._dataset.dtype
        with file.at(name):
            if self.dtype not in [np.dtype(dtype) for dtype in dtypes]:
                raise ValueError(f"has dtype {self.dtype}, not {' or '.join(dtypes)}")
            if len(self._dataset.shape) != 1:
                raise ValueError(f"has {len(self._dataset.shape)} dimensions, not 1")
            self.size = int(self._dataset.shape[0])

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Elements ``start`` to ``stop``, which are there; nothing else is read but the chunks that they lie in.
        Refused if the file was written to after it was opened: what is read would be of neither of two files."""
        with self._file.at(f"{self._name}[{start}:{stop}]"):
            if self._dataset.chunks:
                found = chunks.read(self._dataset, start, stop, self._file.plain)
            else:
                found = np.asarray(self._dataset[start:stop])
            if self._file.plain.changed:
                raise ValueError("the file has been changed since it was opened")
            return found

    def text(self, key: str) -> str:
        """An attribute of the column."""
        return self._file.text(self._name, key)


def new_digest() -> Any:
    """The running digest of a dataset's elements in little-endian order: BLAKE2b, 128 bits."""
    return hashlib.blake2b(digest_size=16)
