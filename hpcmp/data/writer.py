"""Writing a token file: tokens are spooled as they come, then laid out in HDF5 when their number is known.

The file's arrays are contiguous, so that a reader fetches exactly the bytes of its window; a contiguous HDF5 dataset
needs its length when it is made, hence the spools: unnamed temporary files beside the output (disk needed meanwhile:
twice the output). Chunked datasets would grow in place, but every short read at a random place would fetch a whole
chunk, and a second pass over the text instead of spools would tokenise everything twice.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import hdf5
from .tokenizer import Tokenizer, digest
from .tokens import FORMAT, VERSION


class Spool:
    """The tokens and document offsets of one split, on their way to the file: appended to unnamed temporary files."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.dtype = np.min_scalar_type(tokenizer.vocabulary - 1).newbyteorder("<")
        self._close = np.asarray([tokenizer.end_of_document], self.dtype)
        self.tokens = tempfile.TemporaryFile(dir=folder)
        self.offsets = tempfile.TemporaryFile(dir=folder)
        self.documents = self.length = self.bytes = self._begun = 0
        self.offsets.write(np.int64(0).astype("<i8").tobytes())

    def append(self, ids: NDArray[Any], text: bytes) -> None:
        self.tokens.write(ids.astype(self.dtype, copy=False).data)
        self.length += len(ids)
        self.bytes += len(text) if len(ids) else 0

    def end_document(self) -> bool:
        """Close the document; false if it turned out to hold no token at all."""
        if self.length == self._begun:
            return False
        self.append(self._close, b"")
        self._begun = self.length
        self.documents += 1
        self.offsets.write(np.int64(self.length).astype("<i8").tobytes())
        return True

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.tokens.close()
        self.offsets.close()


def write(path: Path, tokenizer: Tokenizer, counts: dict[str, int | str], spools: dict[str, Spool]) -> None:
    """The HDF5 file. Format 1.10: its metadata carries checksums, as do strings of fixed length in it."""
    import h5py

    attributes = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": tokenizer.name,
        "vocabulary": tokenizer.vocabulary,
        "end_of_document": tokenizer.end_of_document,
        **counts,
    }
    with h5py.File(path, "w", libver="v110", locking=False) as file:
        for name, value in attributes.items():
            file.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else value
        stored = file.create_dataset("tokenizer", data=np.frombuffer(tokenizer.definition.encode(), np.uint8))
        stored.attrs["sha256"] = np.bytes_(digest(tokenizer.definition).encode())
        for name, spool in spools.items():
            group = file.create_group(name)
            group.attrs["documents"], group.attrs["tokens"] = spool.documents, spool.length
            group.attrs["bytes"] = spool.bytes
            _copy(spool.tokens, group.create_dataset("tokens", (spool.length,), spool.dtype))
            _copy(spool.offsets, group.create_dataset("documents", (spool.documents + 1,), "<i8"))


def _copy(source: Any, target: Any) -> None:
    """A spool into the dataset made for it, with the digest of what was written."""
    running = hdf5.new_digest()
    source.seek(0)
    for start in range(0, target.size, hdf5.BLOCK):
        count = min(hdf5.BLOCK, target.size - start)
        block = np.frombuffer(source.read(count * target.dtype.itemsize), target.dtype)
        target[start : start + count] = block
        running.update(block.data)
    target.attrs["digest"] = np.bytes_(running.hexdigest().encode())
