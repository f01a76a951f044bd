"""The communicator of a command that runs on every rank, and the checks that come before anything else."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..comm.detect import launcher, oversubscription, share, start_mpi
from ..errors import InputError

if TYPE_CHECKING:
    from mpi4py import MPI


def world() -> MPI.Intracomm | None:
    """MPI's world; None for a process that no launcher started, on a machine without MPI: it runs alone.

    Refuses N worlds of one rank (the wrong mpiexec), and warns of more threads than cores.
    """
    try:
        mpi = start_mpi()
    except (ImportError, RuntimeError) as error:
        if launcher() is None:
            return None
        raise InputError(f"mpi4py finds no MPI library ({error}): see `hpcmp doctor`") from None
    comm: MPI.Intracomm = mpi.COMM_WORLD
    node = comm.Split_type(mpi.COMM_TYPE_SHARED)
    warning = oversubscription(node.size, node.allgather(share()))
    node.Free()
    if warning and comm.rank == 0:
        logging.getLogger("hpcmp").warning("%s", warning)
    return comm
