"""A file that appears complete or not at all: written under another name, synced, renamed."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import InputError, reason


@contextmanager
def publish(output: Path, partial: Path) -> Iterator[None]:
    """The body writes ``partial``, in the same folder; when it ends, the file is synced and renamed to ``output``.

    If the body fails, ``partial`` is removed and ``output`` stays as it was. A process that is killed may leave
    ``partial`` behind, and the next one writes over it; a lock on it keeps two from writing at once. Raises InputError
    if ``output`` cannot be written, or is being written by another process.
    """
    try:
        with open(partial, "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another process is writing {output} (it holds {partial.name})") from None
            except OSError:  # a file system without locks: nothing to hold, and nothing that could be left locked
                pass
            try:
                yield
                _sync(partial)
                os.replace(partial, output)
                _sync(output.parent)
            except BaseException:
                with suppress(OSError):
                    partial.unlink()
                raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        why = os.strerror(error.errno) if error.errno else reason(error)
        raise InputError(f"cannot write {output}: {why}" + (" (twice its size is needed)" if full else "")) from None


def _sync(path: Path) -> None:
    """To the disk, not just to the system's cache; a folder too, which holds the new name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
