"""Watchdog: a thread on every rank that ends a job which hangs, and says which rank is missing where.

Every rank has a file ``rank_00003.alive`` in the folder ``diagnosis`` of the run: who it is, and by its time when it
was last seen alive; a crash adds its Python stack, as does a C library that keeps Python from running. A rank that
waits in one collective for too long, or whose neighbour on the node has died, writes ``rank_00003.json``, with its last
operations and where its threads are, and the file ``hang``, which makes all others do the same: files, since MPI may
hang itself. When all dumps that can come are there, the lowest rank says what they tell (``diagnosis.py``) and ends the
job with exit code 69; what waits for NCCL is given up first. So does a rank to which MPI has raised an error, since
others may have called another collective, and one to which NCCL tells of one. Of any other error nobody waits for
anything (``failed``).
"""

from __future__ import annotations

import atexit
import faulthandler
import logging
import os
import shutil
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from ..checkpoint.owner import Owner, this_process
from ..comm import lanes
from ..comm.detect import alone
from ..comm.mesh import Mesh
from ..comm.recorder import RECORDER
from ..errors import HpcmpError, MismatchError
from .diagnosis import diagnose
from .dumps import FOLDER, HANG, VERDICT, alive_name, dump, dump_name
from .failures import is_mpi_error, leave_error

log = logging.getLogger("hpcmp")

TICK = 0.5  # seconds between looks at this process, and at a neighbour on the node: both cost microseconds
POLL = 5.0  # at most, between looks at the file system; with more than 1,000 ranks they are rarer
BEAT = 60.0  # at most, between two signs of life
GRACE = 30.0  # at most, for the others' dumps, which the file system may show late
PAUSE = 5.0  # seconds between two looks that say that the process was suspended, as `scontrol suspend` does


def watch(directory: Path, mesh: Mesh, seconds: float, *, recovers: bool = False) -> Watchdog | None:
    """The watchdog of this rank of a run in ``directory``; None for one rank alone, or where ``seconds`` is 0. Besides,
    an exception that nobody catches ends the job. ``recovers``: the death of a rank does not. Collective."""
    if mesh.size > 1:
        _end_job_on_errors(mesh.launched[mesh.rank], mesh.size)
        if seconds:
            return Watchdog(directory, mesh, seconds, recovers=recovers)
    if mesh.rank == 0:
        _set_aside(directory / FOLDER)
    return None


def end_job(why: str) -> None:
    """End the job, saying why, with the code of a rank that hangs or is gone. Does not return."""
    _say(why)
    _abort(MismatchError.exit_code)


def failed(error: object, directory: Path, mesh: Mesh, watchdog: Watchdog | None) -> None:
    """The run in ``directory`` ends on this rank, by ``error`` unless it is None: leave it there for the report.

    An error of MPI may come of a collective that other ranks have called otherwise. If there is a watchdog, all ranks
    then dump, the job ends with what the dumps tell, and this does not return.
    """
    if isinstance(error, Exception | KeyboardInterrupt):
        leave_error(directory / FOLDER, mesh.launched[mesh.rank], mesh.size, error)
        if watchdog is not None and is_mpi_error(error):
            watchdog.explain(error)
    if error is not None:
        lanes.abort()  # nobody is to wait for what other ranks no longer join


class Watchdog:
    """Of the run in ``directory``, from now until ``stop``; ``seconds``: how long a rank may wait in one operation.

    recovers: MPI tells the others of a rank that has died, and they go on without it. Collective over ``mesh``. What an
    earlier attempt left in ``diagnosis`` is moved to ``diagnosis.old``.
    """

    def __init__(self, directory: Path, mesh: Mesh, seconds: float, *, recovers: bool = False) -> None:
        self.directory, self.folder, self.seconds, self.recovers = directory, directory / FOLDER, seconds, recovers
        self.rank, self.size = mesh.launched[mesh.rank], mesh.size
        self.poll, self.beat = min(POLL * max(1, mesh.size / 1000), seconds / 8), min(BEAT, seconds / 4)
        self.grace = max(min(GRACE, max(3.0, seconds / 4)), 2 * self.poll)
        if mesh.rank == 0:
            self._begin_anew()
        owners = mesh.gather_objects(this_process())
        self.processes: dict[int, Owner] = dict(zip(mesh.launched, owners, strict=True))
        self.here = [rank for rank in sorted(self.processes) if self.processes[rank].is_here]
        self.alive = self.folder / alive_name(self.rank)
        self._file = None
        try:
            self.alive.write_bytes(self.processes[self.rank].render())
            if not faulthandler.is_enabled():
                self._file = self.alive.open("a")
                faulthandler.enable(self._file)
                self._beat()
        except OSError as error:
            log.warning("watchdog: %s", error)
        self._stopped = threading.Event()
        self._error = ""
        self._thread = threading.Thread(target=self._run, name="hpcmp watchdog", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # before MPI ends, where ranks wait for each other

    def explain(self, error: BaseException) -> None:
        """End the job with what the dumps of all ranks tell of ``error``, which MPI has raised here. Does not return
        unless ``stop`` was called before."""
        self._error = f"got {error}"
        self._thread.join()

    def stop(self) -> None:
        """The run is over, or this rank gives it up: nobody is to wonder that its process ends."""
        atexit.unregister(self.stop)
        self._stopped.set()
        self._thread.join(60)
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.disable()
            self._file.close()
            self._file = None
        try:
            self.alive.unlink(missing_ok=True)
        except OSError:  # the others wonder
            pass

    def _begin_anew(self) -> None:
        _set_aside(self.folder)
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            log.warning("watchdog: %s: ranks that hang will not be named", error)

    def _run(self) -> None:
        polled = beaten = looked = awake = time.monotonic()
        while not self._stopped.wait(min(TICK, self.poll)):
            now = time.monotonic()
            awake = now if now - looked > PAUSE else awake  # nobody has waited while all were suspended
            looked = now
            overdue = self._overdue() if now - awake > self.seconds else ""
            found = self._error or overdue or self._gone() or self._broken()
            if not found and now - polled >= self.poll:
                polled = now
                found = "another rank has asked for it" if _there(self.folder / HANG) else ""
            if not found and now - beaten >= self.beat:
                beaten = now
                self._beat()
            if found and not self._stopped.is_set():
                self._end(found)

    def _overdue(self) -> str:
        record = RECORDER.overdue(self.seconds)
        return f"waits in {record.operation} for more than {self.seconds:g} s" if record else ""

    def _gone(self) -> str:
        """Whether the next rank on this node has died: of any ranks that die, one is next to one that lives."""
        if self.recovers:
            return ""
        after = self.here[(self.here.index(self.rank) + 1) % len(self.here)]
        return f"rank {after} is gone" if after != self.rank and self._is_gone(after) else ""

    def _broken(self) -> str:
        """What NCCL has found in the background, such as a lost connection: nobody gets it as an error."""
        if error := lanes.failure():
            leave_error(self.folder, self.rank, self.size, HpcmpError(error))
            return f"is told by {error}"
        return ""

    def _is_gone(self, rank: int) -> bool:
        """Whether a rank of this node has died without ``stop``."""
        return self.processes[rank].death() is not None and _there(self.folder / alive_name(rank))

    def _beat(self) -> None:
        if self._file is not None:  # written where this thread does not come back, since a C library has Python's lock
            faulthandler.dump_traceback_later(self.seconds, file=self._file)
        text = self.processes[self.rank].render()
        try:
            if self.alive.stat().st_size == len(text):
                os.utime(self.alive)
            else:  # it has come back, or was suspended
                self.alive.write_bytes(text)
        except OSError:
            pass

    def _end(self, why: str) -> None:
        """Dump, gather what the others dump, say it, and end the job. Does not return."""
        faulthandler.cancel_dump_traceback_later()
        gone = [rank for rank in self.here if rank != self.rank and self._is_gone(rank)]
        said = f"rank {self.rank} {why}" if not gone else why
        try:
            if not (self.folder / VERDICT).exists():  # else it was stopped, and wakes up since the job ends
                dump(self.folder, self.rank, self.size, why, {rank: str(self.processes[rank]) for rank in gone})
            (self.folder / HANG).touch()
            first = self._gathered(set(gone)) == self.rank
            deadline = time.monotonic() + self.grace
            while not first and time.monotonic() < deadline and not (self.folder / VERDICT).exists():
                time.sleep(0.1)
            if first or not (self.folder / VERDICT).exists():
                for rank in self.processes:
                    if not (self.folder / dump_name(rank)).exists():
                        _settle(self.folder / alive_name(rank))
                said = "\n".join(diagnose(self.directory)) or said
                _say(said)
                (self.folder / VERDICT).write_text(said + "\n")
            else:
                time.sleep(3)  # the first of them ends the job
        except OSError as error:
            _say(f"{said} ({error})")
        RECORDER.halt()  # before those that wait for a GPU go on
        lanes.abort()
        _abort(MismatchError.exit_code)

    def _gathered(self, gone: set[int]) -> int:
        """Wait for the dumps of all ranks that live; returns the lowest rank that has one."""
        deadline = time.monotonic() + self.grace
        while True:
            there = {rank for rank in self.processes if (self.folder / dump_name(rank)).exists()}
            if time.monotonic() > deadline or there | gone >= set(self.processes):
                return min(there, default=self.rank)
            time.sleep(0.1)


def _set_aside(folder: Path) -> None:
    """Move what an earlier attempt left in ``folder``, ``diagnosis``, to ``diagnosis.old``."""
    old = folder.with_name(folder.name + ".old")
    try:
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
    except OSError as error:
        log.warning("watchdog: %s: what %s holds may be of an earlier attempt", error, folder)


def _settle(path: Path) -> None:
    """Keep a file as it is now: a rank that was stopped wakes up when the job ends, and writes what is no news."""
    copy = path.with_suffix(".part")
    with suppress(OSError):
        shutil.copy2(path, copy)
        copy.replace(path)


def _there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the file server may be back the next time
        return False


def _end_job_on_errors(rank: int, size: int) -> None:
    """A program that is not run by ``hpcmp`` ends the job by an exception, as that does: the others wait for ever."""
    before = sys.excepthook
    if getattr(before, "ends_job", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(f"hpcmp: rank {rank} of {size} on host {socket.gethostname()}\n")
        before(kind, error, trace)
        sys.stderr.flush()
        time.sleep(0.2)
        _abort(130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 70))

    hook.ends_job = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def _say(text: str) -> None:
    """In one write, before what mpirun and srun have to say."""
    sys.stderr.write("".join(f"hpcmp: {line}\n" for line in text.splitlines()))
    sys.stderr.flush()
    time.sleep(0.2)


def _abort(code: int) -> None:
    """End the job, through MPI if that still does it; and this process in any case."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi and mpi.Query_thread() == mpi.THREAD_MULTIPLE and not alone(mpi):
        threading.Thread(target=mpi.COMM_WORLD.Abort, args=(code,), daemon=True).start()
        time.sleep(5)
    os._exit(code)
