"""Where a run writes: directories that it has to itself."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint import Lock
from ..checkpoint.agree import agreed
from ..comm.mesh import Mesh
from ..errors import InputError, InUseError
from .config import Config


class Directories:
    """The directories of a run: ``run`` for its configuration and metrics, and ``checkpoints``; made, and locked.

    Another run may share one of them with this one and not the other, so that each has its lock, which rank 0 takes.
    Collective over ``mesh``. Raises InputError if one cannot be written in, InUseError if another run has it.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.run = Path(config.run.directory)
        self.checkpoints = Path(config.checkpoint.directory)
        self._locks: list[Lock] = []
        with agreed(mesh, lambda who, why: InputError(why)):
            if mesh.rank == 0:
                _make("run.directory", self.run)
                _make("checkpoint.directory", self.checkpoints)
        try:
            with agreed(mesh, lambda who, why: InUseError(why)):
                if mesh.rank == 0:
                    self._take()
        except BaseException:
            self.close()
            raise

    @property
    def lost(self) -> str:
        """What to say of a directory that another run has taken from this one; "" if none has."""
        return next((lock.lost for lock in self._locks if lock.lost), "")

    def close(self) -> None:
        """Let others have the directories."""
        for lock in self._locks:
            lock.release()

    def _take(self) -> None:
        for folder in (self.run, self.checkpoints)[: 1 if self.run.samefile(self.checkpoints) else 2]:
            lock = Lock(folder)
            lock.take()
            self._locks.append(lock)


def _make(key: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".hpcmp-writable").touch()
        (folder / ".hpcmp-writable").unlink(missing_ok=True)  # another run may be at the same
    except OSError as error:
        raise InputError(f"{key}: cannot write in {folder}: {error.strerror}") from None
