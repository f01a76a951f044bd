"""``run.rank_logs``: each rank's own log in a file of the run's directory, beside what is said on the terminal."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

from .. import process

log = logging.getLogger("hpcmp")

FOLDER = "logs"


class RankLog(logging.Handler):
    """Appends all that ``hpcmp`` logs in this process, with times, to ``directory/logs/rank_00003.log``; and whenever
    rank 0 logs a line, where this rank's time went since the last. What cannot be written is lost; that is said once.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.path = directory / FOLDER / f"rank_{rank:05d}.log"
        self.failed = False
        self._level = log.level
        log.addHandler(self)
        log.setLevel(logging.DEBUG)
        cores = sorted(process.cores())
        log.debug("rank %d on %s, process %d, cores %s", rank, socket.gethostname(), os.getpid(), cores)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(self.format(record) + "\n")
        except OSError as error:
            if not self.failed:
                self.failed = True
                log.warning("%s: %s; training goes on without this log", self.path, error.strerror or error)

    def close(self) -> None:
        """Write nothing more."""
        log.removeHandler(self)
        log.setLevel(self._level)
        super().close()
