"""Who holds a lock: a process that can be told from every other one, and whether it is known to have ended."""

from __future__ import annotations

import getpass
import json
import os
import secrets
import socket
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..batch import Job as Job
from ..batch import find_job, has_ended

_dead: set[tuple[str, int, int | None]] = set()


@dataclass(frozen=True)
class Owner:
    """A process that holds a lock.

    machine: where its number means what it means to itself: the host, the system's boot, and the space of numbers (each
    container has its own). start: of the process, in ticks since that boot, since numbers are used again; None where
    the system does not say. taken: when it took the lock, in UTC. token: makes this lock's text differ from all others.
    """

    host: str
    machine: str
    pid: int
    start: int | None
    user: str
    job: Job
    taken: str
    token: str

    def render(self) -> bytes:
        """The text of a lock: JSON."""
        return json.dumps(asdict(self) | {"job": self.job._asdict()}, indent=1).encode() + b"\n"

    @classmethod
    def parse(cls, text: bytes) -> Owner | None:
        """The owner of which ``text`` is the rendering; None if it is no such text."""
        try:
            content = json.loads(text)
            owner = cls(**content | {"job": Job(**content["job"])})
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        texts: list[object] = [owner.host, owner.machine, owner.user, owner.taken, owner.token]
        numbers: list[Any] = [owner.pid, 0 if owner.start is None else owner.start]
        for value, kind in zip(owner.job, Job(), strict=True):
            (texts if isinstance(kind, str) else numbers).append(value)
        good = all(type(x) is str for x in texts) and all(type(x) is int and 0 <= x < 2**63 for x in numbers)
        return owner if good and 0 < owner.pid < 2**31 else None

    def __str__(self) -> str:
        batch = f" ({self.job.scheduler} job {self.job.id})" if self.job.id else ""
        return f"process {self.pid} of {self.user} on {self.host}{batch}, since {self.taken} UTC"

    @property
    def process(self) -> tuple[str, int, int | None]:
        """The same for all locks of the process, and for none of another."""
        return self.machine, self.pid, self.start

    @property
    def is_here(self) -> bool:
        """Whether its process, alive or not, is one of this machine: then this machine knows for sure which."""
        return self.machine == _machine()

    @property
    def is_me(self) -> bool:
        """Whether it is this very process."""
        return self.process == (_machine(), os.getpid(), _stat(os.getpid())[1])

    def death(self) -> str | None:
        """How it is known that the process runs no more; None if it does, or nobody here knows. Takes 10 s at most."""
        if self.process in _dead:
            return "MPI has lost that process"
        if self.is_here:
            return self._death_here()
        mine = find_job()
        if self.job.cluster and self.job.cluster == mine.cluster:
            if self.job.id != mine.id:
                return "its job has ended" if has_ended(self.job) else None
            return "its job has been requeued since" if self.job.restarts < mine.restarts else None
        return None

    def _death_here(self) -> str | None:
        if not running(self.pid):
            return "that process has ended"
        start = _stat(self.pid)[1]
        if start is not None and self.start is not None and start != self.start:
            return "that process has ended, and its number is another's now"
        return None


def declare_dead(owner: Owner) -> None:
    """This process has learnt that another one has ended, wherever that ran."""
    _dead.add(owner.process)


def this_process() -> Owner:
    """This process, as the owner of a new lock."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container that has no name for it
        user = f"user {os.getuid()}"
    taken = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
    start = _stat(os.getpid())[1]
    return Owner(socket.gethostname(), _machine(), os.getpid(), start, user, find_job(), taken, secrets.token_hex(8))


def running(pid: int) -> bool:
    """Whether a process of this machine with that number runs; a zombie, which nobody has waited for, does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        pass
    return _stat(pid)[0] not in ("Z", "X")


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # no Linux: a network card has a number, and where there is none, it is drawn for this process
        boot, space = f"{uuid.getnode():x}", 0
    return f"{socket.gethostname()}/{boot}/{space}"


def _stat(pid: int) -> tuple[str, int | None]:
    """The state of a process, a letter, and when it started, in ticks since the boot; ("", None) if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return "", None
