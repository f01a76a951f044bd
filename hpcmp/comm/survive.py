"""Surviving the loss of ranks: what MPI's fault tolerance (ULFM, in Open MPI 5 and later) has for it.

A rank that dies makes the calls of those that wait for it raise an error. They revoke all communicators of theirs, so
that whoever waits in one of them for a rank that lives gets an error, too; agree that not all is well; and shrink: the
processes that are left get a communicator of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from typing import TYPE_CHECKING, cast

import numpy as np
from mpi4py import MPI

from . import base
from .detect import launcher, mpi_library
from .recorder import RECORDER

if TYPE_CHECKING:
    from collections.abc import Sequence

LOST = MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED
_IDLE = 0.05  # seconds between two looks of a rank that waits for the end of all the others' work
_BUSY = 0.001  # and of one that has done its own
_LATE = 3.0  # within which what has led to an error is known
_held: list[MPI.Intracomm] = []


def hold(comm: MPI.Intracomm) -> MPI.Intracomm:
    """``comm``, which ``revoke`` revokes from now on, unless it is freed."""
    _held[:] = [each for each in _held if each != MPI.COMM_NULL]
    _held.append(comm)
    return comm


def missing() -> str:
    """Why ranks cannot be lost here without the loss of all; "" if they can. It sends nothing."""
    started = launcher()
    try:  # its calls are there, and say nothing, where it is not switched on
        on = ctypes.c_bool.in_dll(ctypes.CDLL(str(mpi_library())), "ompi_ftmpi_enabled").value
    except (OSError, ValueError):
        on = False
    if on and started is not None and started.name == "Open MPI":
        return ""
    return "MPI ends the job with any of its ranks here: start them with Open MPI 5's `mpirun --with-ft ulfm`"


def is_loss(error: BaseException) -> bool:
    """Whether an error comes of the loss of a rank, which this one or another has noticed.

    Those of MPI may be of any kind: Open MPI's nonblocking collectives tell of the first operation that failed alone.
    """
    if not isinstance(error, MPI.Exception):
        return False
    end = time.monotonic() + _LATE
    while error.Get_error_class() not in LOST:
        known = [comm for comm in _held if comm != MPI.COMM_NULL]
        if any(comm.Is_revoked() or comm.Get_failed().size for comm in known):
            break
        if time.monotonic() > end:
            return False
        MPI.COMM_SELF.Iprobe()  # makes progress
        time.sleep(_BUSY)
    return True


def revoke() -> None:
    """After a loss: give up all that is under way on the communicators that are held, here and on the other ranks. Not
    collective."""
    for comm in _held:
        if comm != MPI.COMM_NULL:
            with contextlib.suppress(MPI.Exception):
                comm.Revoke()
    _held.clear()  # they are not freed: that is collective, and some rank may be dead
    base.DRIVERS.clear()
    RECORDER.forget()


def free() -> None:
    """After ``revoke``: let go of the memory in which communications were under way, as soon as MPI has done so; that
    of a message that does not come to its end stays."""
    end = time.monotonic() + _LATE
    while base.ABANDONED and time.monotonic() < end:
        base.ABANDONED[:] = [each for each in base.ABANDONED if not all(map(_over, each[0]))]
        time.sleep(_BUSY)


def _over(request: MPI.Request) -> bool:
    try:
        return bool(request.Test())
    except MPI.Exception:
        return True


class Survivors:
    """The processes of ``comm`` that live. ranks: their numbers in MPI's world, in order. Collective over them all, but
    for ``group``. Raises MPI.Exception, see ``is_loss``, if ranks are lost meanwhile."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.comm = hold(comm.Dup())
        self.ranks = self._ranks()

    def group(self, ranks: Sequence[int]) -> MPI.Intracomm:
        """A communicator of some of them, in this order. Collective over these alone."""
        here = self.comm.group
        return hold(self.comm.Create_group(here.Incl([self.ranks.index(rank) for rank in ranks])))

    def agree(self, well: bool, *, idle: bool = False) -> bool:
        """Whether all that live say that all is ``well``: the same on all of them, whoever dies meanwhile. ``idle``: it
        will take long until the others have come to it, and this process leaves its core to them."""
        flag = np.array([well], np.int32)
        request = self.comm.Iagree(flag)
        with contextlib.suppress(MPI.Exception):  # of a loss: what all have agreed on is there all the same
            while not request.Test():
                time.sleep(_IDLE if idle else _BUSY)
        return bool(flag[0])

    def shrink(self) -> list[int]:
        """Forget those that are dead; returns them. Collective over those that live."""
        self.comm = hold(cast("MPI.Intracomm", self.comm.Shrink()))
        before, self.ranks = self.ranks, self._ranks()
        return [rank for rank in before if rank not in self.ranks]

    def _ranks(self) -> list[int]:
        return [int(rank) for rank in self.comm.group.Translate_ranks(None, MPI.COMM_WORLD.group)]
