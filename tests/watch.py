"""Which files of some folders are opened, by whatever means, C libraries too: Linux's inotify."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
IN_ACCESS, IN_OPEN = 0x1, 0x20
_EVENT = struct.Struct("iIII")


class Watch:
    """``opened()`` tells what was opened or read in ``folders`` since it was last asked. Use as a context manager."""

    def __init__(self, *folders: Path) -> None:
        self._descriptor = LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "no inotify")
        self._folders = {self._add(folder): folder for folder in folders}

    def _add(self, folder: Path) -> int:
        number = int(LIBC.inotify_add_watch(self._descriptor, os.fsencode(folder), IN_ACCESS | IN_OPEN))
        if number < 0:
            raise OSError(ctypes.get_errno(), "cannot be watched", str(folder))
        return number

    def opened(self) -> set[str]:
        """Paths of files; a folder that was listed by its own."""
        found = set()
        while True:
            try:
                data = os.read(self._descriptor, 1 << 16)
            except BlockingIOError:
                return found
            while data:
                number, _, _, length = _EVENT.unpack_from(data)
                name = data[_EVENT.size : _EVENT.size + length].rstrip(b"\0")
                found.add(str(self._folders.get(number, Path("?")) / os.fsdecode(name)))
                data = data[_EVENT.size + length :]

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
