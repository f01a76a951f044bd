"""A file that HDF5 can always close."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any


class GuardedFile(io.FileIO):
    """A file that keeps the first error of writing to itself until ``check`` raises it.

    HDF5 cannot close a file whose last writes fail (disk full, quota, a limit on file sizes), and its library then
    crashes when the interpreter ends. Given this object it believes that every write succeeded and closes in peace;
    nothing is lost, since a file with an error is thrown away.
    """

    def __init__(self, path: Path, mode: str) -> None:
        super().__init__(path, mode)
        self.path = path
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of ``data``, in as many system calls as that takes."""
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view) and self.error is None:
            try:
                written += super().write(view[written:]) or 0
            except OSError as error:
                self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the length."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def check(self) -> None:
        """Raise the first error of writing, if there was one, with the file's name."""
        if self.error is not None:
            raise OSError(self.error.errno, self.error.strerror, str(self.path))
