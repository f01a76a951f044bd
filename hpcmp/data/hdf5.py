"""HDF5 files from elsewhere, checked before use: every reader goes through these functions.

An HDF5 file may point at other files (external links, external storage, virtual datasets) or ask for plug-in code
(filters). None of that belongs in a token file, and all of it is refused: what is read lies in the file itself.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

BLOCK = 1 << 20  # elements read or written at once where a whole dataset is gone through
SIGNATURE = b"\x89HDF\r\n\x1a\n"
FILTERS = {1, 2, 3}  # deflate, shuffle, Fletcher checksum: part of every HDF5 library


def open_file(path: Path, kind: str) -> Any:
    """``path`` opened for reading, if its root attribute ``format`` is ``kind``.

    Without file locks: token files never change, and some file systems lack them.
    """
    try:
        with open(path, "rb") as raw:
            start = raw.read(len(SIGNATURE))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    if start != SIGNATURE:
        raise DataError(f"{path} is not an HDF5 file" + ("" if start else ": it is empty"))
    import h5py

    file = None
    try:
        file = h5py.File(path, "r", locking=False)
        found = file.attrs.get("format")
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        if file is not None:
            file.close()
        raise DataError(f"{path} is truncated or damaged: {reason(error)}") from None
    if not isinstance(found, bytes) or found != kind.encode():
        file.close()
        raise DataError(f"{path} is an HDF5 file, but not a token file of hpcmp: make one with `hpcmp data prepare`")
    return file


def child(group: Any, name: str, path: Path) -> Any:
    """The object ``name`` of a group: an HDF5 group or dataset held by a hard link."""
    import h5py

    where = f"{group.name.rstrip('/')}/{name}".lstrip("/")
    try:
        link = group.get(name, getlink=True)
        if link is None:
            raise DataError(f"{path} has no {where}")
        if not isinstance(link, h5py.HardLink):
            raise DataError(f"{path}: {where} is a link to elsewhere, which is not allowed")
        return group[name]
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise DataError(f"{path} is damaged at {where}: {reason(error)}") from None


def subgroup(group: Any, name: str, path: Path) -> Any:
    """The group ``name`` inside a group."""
    import h5py

    found = child(group, name, path)
    if not isinstance(found, h5py.Group):
        raise DataError(f"{path}: {name} is not a group")
    return found


def dataset(group: Any, name: str, dtypes: tuple[str, ...], path: Path) -> Any:
    """A one-dimensional dataset that lies whole in this file, of one of ``dtypes``."""
    import h5py

    found = child(group, name, path)
    where = f"{group.name.rstrip('/')}/{name}".lstrip("/")
    if not isinstance(found, h5py.Dataset):
        raise DataError(f"{path}: {where} is not a dataset")
    try:
        layout = found.id.get_create_plist()
        if layout.get_layout() not in (h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED) or layout.get_external_count():
            raise DataError(f"{path}: {where} keeps its numbers elsewhere (virtual or external), which is not allowed")
        if any(layout.get_filter(i)[0] not in FILTERS for i in range(layout.get_nfilters())):
            raise DataError(f"{path}: {where} needs a filter plug-in, which is not allowed")
        if found.dtype not in [np.dtype(d) for d in dtypes]:
            raise DataError(f"{path}: {where} has dtype {found.dtype}, not {' or '.join(dtypes)}")
        if found.ndim != 1:
            raise DataError(f"{path}: {where} has {found.ndim} dimensions, not 1")
        contiguous = layout.get_layout() == h5py.h5d.CONTIGUOUS
        if contiguous and found.id.get_storage_size() != found.size * found.dtype.itemsize:
            raise DataError(f"{path}: {where} has {found.size} elements, but storage for fewer")
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged at {where}: {reason(error)}") from None
    return found


def text(holder: Any, name: str, path: Path) -> str:
    """A fixed-length string attribute (variable-length ones lie outside HDF5's checksums)."""
    value = _attribute(holder, name, path)
    if not isinstance(value, bytes):
        raise DataError(f"{path}: attribute {name} is not a fixed-length string")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path}: attribute {name} is not UTF-8 text") from None


def integer(holder: Any, name: str, path: Path) -> int:
    """A scalar integer attribute, not negative."""
    value = _attribute(holder, name, path)
    if not isinstance(value, np.integer) or value < 0:
        raise DataError(f"{path}: attribute {name} is not an integer >= 0")
    return int(value)


def read(data: Any, start: int, stop: int | None, path: Path) -> NDArray[Any]:
    """``data[start:stop]`` (to the end for None); a read that fails names the file and the elements."""
    try:
        values: NDArray[Any] = data[start:stop]
    except (OSError, RuntimeError) as error:
        raise DataError(f"cannot read {path}: {data.name}[{start}:{stop}]: {reason(error)}") from None
    return values


def new_digest() -> Any:
    """The running digest of a dataset's elements in little-endian order: BLAKE2b, 128 bits."""
    return hashlib.blake2b(digest_size=16)


def reason(error: BaseException) -> str:
    """HDF5's explanation, as one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _attribute(holder: Any, name: str, path: Path) -> Any:
    import h5py

    try:
        if name not in holder.attrs:
            raise DataError(f"{path} has no attribute {name} at {holder.name}")
        kind = holder.attrs.get_id(name)
        if kind.shape != () or h5py.check_vlen_dtype(kind.dtype) or kind.dtype.kind not in "Siu":
            return None
        return holder.attrs[name]
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged at attribute {name}: {reason(error)}") from None
