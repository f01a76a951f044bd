"""HDF5 files from elsewhere, read with suspicion: every reader of HDF5 goes through ``Hdf5File``.

An HDF5 file may name other files (external and soft links, external storage, virtual datasets), ask for code to be
loaded (filters), and claim sizes that no memory holds. Here all that is refused before it is followed, run or
allocated: only names that the caller gives are looked up, only hard links lead on, and numbers are plain ones that lie
in this very file, all of them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import numpy as np

from .errors import HpcmpError, reason
from .plain import PlainFile

DEFLATE, SHUFFLE, FLETCHER32 = FILTERS = 1, 2, 3  # HDF5's numbers of the filters that may be allowed
INFLATION = 1032  # bytes that deflate makes of one at most (https://zlib.net/zlib_tech.html)
CHUNK = 16 << 20  # bytes of a chunk at most: each is held whole, several times over
TEXT = 1 << 16  # bytes of an attribute at most
_SIGNATURE = b"\x89HDF\r\n\x1a\n"


class Hdf5File:
    """An HDF5 file open for reading; ``error(message)`` is raised for all that is wrong with it, in one line.

    path: its name. size: its length in bytes. plain: the file itself, through which HDF5 reads it, and which is closed
    with this; nothing else is opened, and no lock is asked for. From then on HDF5 finds no plug-ins in this process.
    Use as a context manager, or ``close`` it.
    """

    def __init__(self, file: PlainFile, error: Callable[[str], HpcmpError]) -> None:
        import h5py

        self._groups: dict[str, Any] = {}
        self.path, self.size, self.plain, self._error = file.path, file.size, file, error
        while h5py.h5pl.size():  # the folders that are searched for plug-ins
            h5py.h5pl.remove(0)
        try:
            with self.at(""):
                file.seek(0)
                if file.read(len(_SIGNATURE)) != _SIGNATURE:
                    raise ValueError("not an HDF5 file" + ("" if file.size else ": it is empty"))
            with self.at("truncated or damaged"):
                self._file = h5py.File(file, "r")
        except BaseException:
            file.close()
            raise
        # At the latest when the interpreter ends: HDF5 would close the file later, and find no interpreter to ask.
        self._end = weakref.finalize(self, _close, self._file, file)

    def close(self) -> None:
        """Close the file; may be called again."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """What fails in the body, as an error that names the file and ``place`` in it."""
        try:
            yield
        except HpcmpError:
            raise
        except (OSError, RuntimeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise self._error(": ".join(filter(None, (str(self.path), place, reason(error))))) from None

    def dataset(self, name: str, filters: tuple[int, ...] | None = None) -> Any:
        """The h5py dataset ``name``: integers or floats of NumPy's, with storage in this file for each of them.

        filters: None for a contiguous dataset alone; else it may be chunked, too, through these filters. (Who reads
        such a one must not let HDF5 run deflate, which stops at no size.)
        """
        import h5py

        with self.at(name):
            found = self._find(name)
            if not isinstance(found, h5py.Dataset):
                raise ValueError("not a dataset")
            kind = found.id.get_type()
            if kind.get_class() not in (h5py.h5t.INTEGER, h5py.h5t.FLOAT):
                raise ValueError("not a dataset of plain numbers")
            if kind.dtype.kind not in "iuf" or not kind.equal(h5py.h5t.py_create(kind.dtype)):
                raise ValueError("not a dataset of plain numbers")
            _check_storage(found, filters, self.size)
        return found

    def attribute(self, name: str, key: str) -> Any:
        """The value of an attribute of the object ``name`` ("" for the root), if it is one integer or one text of fixed
        length (those of variable length lie outside HDF5's checksums); None if it is not, or not there."""
        import h5py

        with self.at(name):
            holder = self._find(name)
            if not h5py.h5a.exists(holder.id, key.encode()):
                return None
            found = h5py.h5a.open(holder.id, key.encode())
            kind = found.get_type()
            number = kind.get_class() == h5py.h5t.INTEGER
            string = kind.get_class() == h5py.h5t.STRING and not kind.is_variable_str()
            if not (number or string) or found.shape != () or kind.get_size() > TEXT:
                return None
            return holder.attrs[key]

    def integer(self, name: str, key: str) -> int:
        """An attribute that is an integer, not negative."""
        value = self.attribute(name, key)
        with self.at(name):
            if not isinstance(value, np.integer) or value < 0:
                raise ValueError(f"attribute {key} is missing, or is not an integer >= 0")
        return int(value)

    def text(self, name: str, key: str) -> str:
        """An attribute that is a text of fixed length, in UTF-8."""
        value = self.attribute(name, key)
        with self.at(name):
            if not isinstance(value, bytes):
                raise ValueError(f"attribute {key} is missing, or is not a fixed-length string")
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError:
                raise ValueError(f"attribute {key} is not UTF-8 text") from None

    def _find(self, name: str) -> Any:
        """The object ``name``, to which hard links lead."""
        import h5py

        parent, _, last = name.strip("/").rpartition("/")
        if not last:
            return self._file
        # Looked up once: the tensors of a model are many, their groups few.
        if (group := self._groups.get(parent)) is None:
            group = self._groups[parent] = self._find(parent)
        # Not ``last in group``: that would follow a link out of the file to see whether something is there.
        if not isinstance(group, h5py.Group) or not group.id.links.exists(last.encode()):
            raise ValueError("is not there")
        if group.id.links.get_info(last.encode()).type != h5py.h5l.TYPE_HARD:
            raise ValueError("a link to elsewhere, which is not allowed")
        return group[last]


def _check_storage(found: Any, filters: tuple[int, ...] | None, size: int) -> None:
    """ValueError unless all numbers of a dataset lie in its file of ``size`` bytes, in a way that is allowed."""
    import h5py

    plist = found.id.get_create_plist()
    chunked = plist.get_layout() == h5py.h5d.CHUNKED and filters is not None
    if not (chunked or plist.get_layout() == h5py.h5d.CONTIGUOUS) or plist.get_external_count():
        raise ValueError("not stored in one piece in this file, which is not allowed")
    used = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
    if not set(used) <= set(filters or ()) or len(set(used)) != len(used):
        raise ValueError("stored through filters, which are not allowed")
    if found.shape is None:
        raise ValueError("holds nothing")
    itemsize = found.dtype.itemsize
    claimed = math.prod(found.shape) * itemsize  # found.size may overflow
    if chunked:
        if math.prod(found.chunks) * itemsize > CHUNK:
            raise ValueError(f"stored in chunks of more than {CHUNK} bytes, which is not allowed")
        chunks = math.prod(-(-n // c) for n, c in zip(found.shape, found.chunks, strict=True))
        room = size * (INFLATION if DEFLATE in used else 1)
        held = claimed <= room and chunks <= size and found.id.get_num_chunks() == chunks
    else:
        offset = found.id.get_offset()  # None where there is no storage
        held = claimed == found.id.get_storage_size() and claimed + (offset or 0) <= size and (offset or not claimed)
    if not held:
        raise ValueError(f"claims {claimed} bytes, which are not in the file")


def _close(file: Any, plain: PlainFile) -> None:
    file.close()
    plain.close()
