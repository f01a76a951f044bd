"""Files from elsewhere, opened so that nothing but a plain file is ever read: no link, no pipe, no device."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path
from typing import Any


class PlainFile(io.FileIO):
    """A plain file open for reading. Its name is looked up once, so that what was checked is what is read.

    path: its name. size: its length in bytes when it was opened. ``links`` allows the name to be a symbolic link.
    Raises OSError with the name if it is anything but a plain file; opening never waits.
    """

    def __init__(self, path: Path, *, links: bool = False) -> None:
        self.path = path
        self._check(path.stat() if links else path.lstat())  # before it is opened: opening a device may set it off
        # And once more when it is open: a pipe or a link may have come in its place since.
        only = 0 if links else os.O_NOFOLLOW
        super().__init__(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | only))
        try:
            status = os.fstat(self.fileno())
            self.size, self._written = self._check(status), status.st_mtime_ns
        except OSError:
            self.close()
            raise

    @property
    def changed(self) -> bool:
        """Whether the file has been written to since it was opened, by its size and time of modification."""
        now = os.fstat(self.fileno())
        return (now.st_size, now.st_mtime_ns) != (self.size, self._written)

    def read_at(self, buffer: Any, offset: int) -> None:
        """Fill all of ``buffer``, C-contiguous, from byte ``offset`` on. Raises OSError if the file ends before."""
        view = memoryview(buffer).cast("B")
        while view:
            count = os.preadv(self.fileno(), [view], offset)
            if not count:
                raise OSError(errno.EIO, f"ends at byte {offset}, before what it should hold", str(self.path))
            view, offset = view[count:], offset + count

    def _check(self, status: os.stat_result) -> int:
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a plain file", str(self.path))
        return status.st_size

    def readinto(self, buffer: Any) -> int:
        """Fill all of ``buffer``. Raises OSError if the file ends before it is full."""
        view = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(view):
            count = super().readinto(view[filled:])
            if not count:
                raise OSError(errno.EIO, f"ends at byte {self.tell()}, before what it should hold", str(self.path))
            filled += count
        return filled


def read_whole(path: Path, limit: int, *, links: bool = False) -> bytes:
    """All of a plain file that has at most ``limit`` bytes; of a longer one nothing is read. Raises OSError."""
    with PlainFile(path, links=links) as file:
        if file.size > limit:
            raise OSError(errno.EFBIG, f"not a file of at most {limit} bytes", str(path))
        return bytes(file.read(file.size) or b"")
