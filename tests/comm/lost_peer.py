"""A job whose GPUs wait for what never comes: ``python -m tests.comm.lost_peer FOLDER SECONDS HOW``, over the model."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from hpcmp.comm.detect import start_mpi
from hpcmp.comm.mesh import Mesh
from hpcmp.comm.mpi import MpiCommunicator
from hpcmp.comm.nccl import NcclCommunicator
from hpcmp.comm.recorder import Flight
from hpcmp.training import watchdog as guard
from tests.comm.nccl_model import NcclError, model


def main(folder: str, seconds: str, how: str) -> None:
    """A reduction, the fault, another reduction, and what a program makes of it."""
    world = start_mpi().COMM_WORLD
    mesh = Mesh(world, dp=world.size)
    place, last = Path(folder), mesh.rank == mesh.size - 1
    library = model(world)
    library.lazy = True
    comm = NcclCommunicator(MpiCommunicator(world.Dup()), library)
    comm.flight = Flight("dp", range(world.size))
    guard.POLL = 0.5  # so that the test is short
    watchdog = guard.watch(place, mesh, float(seconds))
    end = guard._abort
    guard._abort = lambda code: (time.sleep(1), end(code))  # time for what must not be done
    if how == "unconnected" and last:
        time.sleep(600)
    comm.all_reduce(np.ones(16)).wait()
    library.current().synchronize()
    try:
        if last and how == "raised":
            raise ValueError("planted")
        if last:
            time.sleep(600)
        if how == "broken" and mesh.rank == 0:
            library.found[0] = NcclError(6, "NCCL_ERROR_REMOTE_ERROR: remote process exited")
        comm.all_reduce(np.ones(16, np.float32)).wait()
        library.current().synchronize()
        (place / f"woken_{mesh.rank}").write_text(json.dumps(library.log))
        with mesh.flight.blocking("what ranks agree on before a checkpoint"):
            (place / f"saved_{mesh.rank}").touch()
    except Exception as error:
        guard.failed(error, place, mesh, watchdog)
        (place / f"failed_{mesh.rank}").write_text(json.dumps(library.log))
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
