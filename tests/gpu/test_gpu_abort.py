"""An operation of NCCL whose peer never comes ends when its communicator is aborted."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from hpcmp.comm import lanes

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


@pytest.mark.gpu
@pytest.mark.mpi(min_size=2)
@pytest.mark.timeout(180)
def test_abort_ends_what_waits_for_a_peer_that_never_comes(world: Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    from hpcmp.comm.device import select_device
    from hpcmp.comm.mpi import MpiCommunicator
    from hpcmp.comm.nccl import NcclCommunicator

    monkeypatch.setenv("HPCMP_SHARE_GPU", "1")
    if not select_device(world.rank, world.allgather).nccl:
        pytest.skip("NCCL needs a GPU for each rank, or NCCL_MULTI_RANK_GPU_ENABLE=1")
    comm = NcclCommunicator(MpiCommunicator(world.Dup()))
    x = cupy.ones(1 << 20)
    comm.all_reduce(x).wait()
    sent = comm.send(x, (comm.rank + 1) % comm.size)
    comm.recv(x.shape, x.dtype, (comm.rank - 1) % comm.size, like=x).wait()
    sent.wait()
    cupy.cuda.get_current_stream().synchronize()
    pending = comm.all_reduce(x) if comm.rank else None
    world.Barrier()
    time.sleep(1)
    assert pending is None or not pending.test()
    assert lanes.failure() == ""
    world.Barrier()
    assert lanes.abort(60)
    if pending is not None:
        pending.wait()
        cupy.cuda.get_current_stream().synchronize()
    world.Barrier()
    comm.close()
