"""The lock of a directory: of two runs that would write in it, one does.

    lock                         says who has the directory
    .lock-0123456789abcdef       the claim to remove the lock that has this digest, held for a moment

Both are made with O_CREAT and O_EXCL, which NFS and Lustre keep, where sites switch flock off. The owner touches its
lock every BEAT seconds, from a thread: that is how other machines know that it lives.

Nobody removes a lock, not even its owner, without its claim. No two locks have the same text, hence not the same claim:
so a lock whose owner is dead is removed once, however many find it so, and never the next one that is in its place.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import InUseError
from .owner import Owner, this_process

NAME = "lock"
BEAT = 20.0  # seconds between two touches
MISSED = 15  # as many touches have to be missing, while we watch, before an owner on another machine counts as dead
FORGOTTEN = 900.0  # seconds without a touch after which it does at once; clocks may differ by ten minutes
_LIMIT = 1 << 16  # bytes of a lock that are read
_LEAVE = 20.0  # seconds that the thread may take to notice that the lock is given back; it would make it again
_TRIES, _PAUSE = 100, 0.05  # attempts, and seconds between two, while others make, remove or claim the lock
_silent: set[tuple[object, ...]] = set()  # processes that gave no sign of life while we watched one of their locks
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Found:
    """A lock as it was found: its text, and when its owner touched it, in nanoseconds by the file server's clock."""

    text: bytes
    touched: int

    @property
    def owner(self) -> Owner | None:
        return Owner.parse(self.text)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text).hexdigest()[:16]


class Lock:
    """The lock of ``directory``, which must exist; ``with Lock(directory): ...`` has it to itself.

    lost: who has it now, if another process took this one for dead; "" as long as all is well. Noticed within BEAT
    seconds; whatever is saved in the directory asks ``check`` besides.
    """

    def __init__(self, directory: Path | str) -> None:
        self.path = Path(directory) / NAME
        self.lost = ""
        self._text = b""
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lock:
        self.take()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def take(self) -> None:
        """Take the lock, from a dead owner if need be, which is logged.

        Whether an owner on this machine lives is known at once, and so is the end of its job where the same Slurm ran
        it. Of another one a sign of life is waited for, 2 * BEAT seconds at most; it is dead if there is none in
        MISSED * BEAT seconds. Raises InUseError if another has the lock, OSError if none can be made.
        """
        text = this_process().render()
        for attempt in range(_TRIES):
            if _create(self.path, text):
                break
            found = _read(self.path)
            if found is None or (found.owner is None and attempt < _TRIES // 2):  # it is being made, or removed
                time.sleep(_PAUSE)
            elif (how := self._death(found)) and _remove(self.path, found, text):
                _log.warning("%s: taken over from %s: %s", self.path, found.owner or "a run unknown", how)
        else:
            raise InUseError(f"{self.path} does not come free: remove it and {self.path.parent}/.{NAME}-* by hand")
        self._text, self.lost = text, ""
        self._released.clear()
        self._thread = threading.Thread(target=self._keep_alive, name="hpcmp-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Remove the lock, if it is still this one's. May be called twice."""
        if self._thread is None:
            return
        self._released.set()
        self._thread.join(_LEAVE)
        self._thread = None
        with suppress(OSError):
            found = _read(self.path)
            if found and found.text == self._text and found.owner and found.owner.is_me:  # not a child of it
                _remove(self.path, found, self._text)

    def _death(self, found: _Found) -> str:
        """How it is known that an owner is dead; "" if the lock has changed. Raises InUseError if the owner lives."""
        if how := _known_dead(self.path, found):
            return how
        if found.owner and found.owner.is_here:
            raise _in_use(self.path, found)
        _log.warning("%s: held by %s; waiting for a sign of life", self.path, found.owner or "a run unknown")
        for _ in range(MISSED):
            time.sleep(BEAT)
            now = _read(self.path)
            if now is None or now.text != found.text:
                return ""
            if now.touched != found.touched:
                raise _in_use(self.path, found)
        if found.owner:
            _silent.add(found.owner.process)
        return f"no sign of life in {MISSED * BEAT:g} s"

    def _keep_alive(self) -> None:
        """The thread: touch the lock, make it again if someone removed it, and see whether it is another's now."""
        while not self._released.wait(BEAT):
            try:
                found = _read(self.path)
                if found is None and _create(self.path, self._text):
                    _log.warning("%s: someone removed it while this run had it; it is there again", self.path)
                elif found and found.text != self._text:
                    self.lost = f"{self.path.parent} has been taken over by {found.owner or 'a run unknown'}"
                    _log.error("%s, which took this run for dead", self.lost)
                    return
                elif found:
                    os.utime(self.path)
            except OSError:  # the file server may be back the next time
                continue


def check(directory: Path) -> None:
    """Raise InUseError if another process has the lock of ``directory``, and is not known to be dead."""
    path = directory / NAME
    found = _read(path)
    if found is None or (found.owner and found.owner.is_me) or _known_dead(path, found):
        return
    raise _in_use(path, found)


def _in_use(path: Path, found: _Found) -> InUseError:
    who = found.owner or "a run that does not say who it is"
    return InUseError(
        f"{path.parent} is in use by {who}: wait for its end, or let this run use another directory; "
        f"only if you know that it has ended, remove {path}"
    )


def _create(path: Path, text: bytes) -> bool:
    """Make the file, unless it exists. Raises OSError, and leaves none, if it cannot be written."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    return True


def _read(path: Path) -> _Found | None:
    """The lock at ``path``; None if there is none."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            return _Found(file.read(_LIMIT), os.fstat(file.fileno()).st_mtime_ns)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise


def _remove(path: Path, found: _Found, text: bytes) -> bool:
    """Remove the lock that was ``found``: False if it has changed, or another process has the claim to it."""
    claim = path.with_name(f".{path.name.lstrip('.')}-{found.digest}")
    if not _create(claim, text):
        other = _read(claim)
        if other and _known_dead(claim, other):
            _remove(claim, other, text)
        else:
            time.sleep(_PAUSE)
        return False
    try:
        if _read(path) != found:
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        claim.unlink(missing_ok=True)


def _known_dead(path: Path, found: _Found) -> str | None:
    """How it is known, without waiting, that the owner of a lock or a claim is dead."""
    owner = found.owner
    if owner is not None and ((how := owner.death()) or owner.is_here):
        return how
    if owner is not None and owner.process in _silent:
        return "it holds another lock, with no sign of life"
    with tempfile.TemporaryFile(dir=path.parent) as ours:  # the file server's clock, not this machine's
        silent = (os.fstat(ours.fileno()).st_mtime_ns - found.touched) / 1e9
    return f"no sign of life for {silent / 60:.0f} minutes" if silent > FORGOTTEN else None
