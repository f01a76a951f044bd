"""By which error each rank of a run has ended: written to the folder ``diagnosis`` by the rank, read for the report."""

from __future__ import annotations

import json
import socket
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import HpcmpError
from . import dumps


def error_name(rank: int) -> str:
    """The file of a rank's error."""
    return f"rank_{rank:05d}.error"


def is_mpi_error(error: BaseException) -> bool:
    """Whether MPI has raised it."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and isinstance(error, mpi.Exception)


def leave_error(folder: Path, rank: int, size: int, error: BaseException) -> None:
    """Write by what this rank ends to its file in ``folder``; lost if that cannot be written."""
    own = isinstance(error, HpcmpError)  # its message says all
    said = str(error) if own or is_mpi_error(error) else f"{type(error).__name__}: {error}".rstrip(": ")
    calls = [] if own else dumps.listed(traceback.extract_tb(error.__traceback__))
    with suppress(OSError):
        folder.mkdir(exist_ok=True)
        told = {"host": socket.gethostname(), "error": said, "calls": calls}
        dumps.write_json(folder / error_name(rank), rank, size, told)


@dataclass(frozen=True)
class Failure:
    """By what a rank has ended. time: in seconds since 1970. calls: of its stack, the innermost last; [] where the
    error says all."""

    rank: int
    size: int
    time: float
    host: str
    error: str
    calls: list[str]

    @property
    def place(self) -> str:
        """The innermost call that is neither of a library nor of the communication itself."""
        own = [call for call in self.calls if not call.startswith(("hpcmp/comm/", "hpcmp/collectives.py"))]
        return dumps.innermost(own) if own else ""


def read_failures(folder: Path) -> list[Failure]:
    """Those of all ranks, in the order in which they came; damaged ones are passed over."""
    found = []
    for path in folder.glob("rank_*.error"):
        try:
            told = json.loads(dumps.read_text(path))
            numbers = int(told["rank"]), int(told["size"]), float(told["time"])
            failure = Failure(*numbers, str(told["host"]), str(told["error"]), [str(call) for call in told["calls"]])
            if told["format"] == dumps.FORMAT and 0 <= failure.rank < failure.size:
                found.append(failure)
        except dumps.DAMAGE:
            continue
    return sorted(found, key=lambda failure: (failure.time, failure.rank))
