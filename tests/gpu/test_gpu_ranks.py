"""Several ranks on GPUs: NCCL and MPI move CuPy arrays as MPI moves host arrays, and layouts give the serial model.

NCCL runs when every rank has a GPU of its own, or with NCCL_MULTI_RANK_GPU_ENABLE=1 (NCCL 2.30.3 or later); MPI also
with several ranks on a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hpcmp.arrays import to_host
from hpcmp.training.engine import Result
from hpcmp.training.verify import short, source_of
from tests.comm.cases import differences
from tests.layouts import engine, layouts, small

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

    from hpcmp.comm.layouts import Layouts

pytestmark = [pytest.mark.gpu, pytest.mark.mpi, pytest.mark.timeout(300)]


@pytest.fixture(params=["nccl", "staged", "direct"])
def backend(request: pytest.FixtureRequest, world: Intracomm, monkeypatch: pytest.MonkeyPatch) -> str:
    """How arrays move, with this rank's GPU current; skips what cannot run here."""
    from mpi4py import MPI

    from hpcmp.comm.detect import cuda_aware
    from hpcmp.comm.device import select_device

    monkeypatch.setenv("HPCMP_SHARE_GPU", "1")
    device = select_device(world.rank, world.allgather)
    if request.param == "nccl" and not device.nccl:
        pytest.skip("NCCL needs a GPU for each rank, or NCCL_MULTI_RANK_GPU_ENABLE=1")
    if request.param == "direct" and not cuda_aware(MPI):
        pytest.skip("this MPI is not CUDA-aware")
    return str(request.param)


@pytest.fixture
def comm(backend: str, world: Intracomm) -> Iterator[Layouts]:
    from hpcmp.comm.mpi import MpiCommunicator
    from hpcmp.comm.nccl import NcclCommunicator

    made = MpiCommunicator(world.Dup(), staged=backend == "staged")
    over = NcclCommunicator(made) if backend == "nccl" else made
    yield over
    over.close()


def test_calls_equal_those_on_the_host(comm: Layouts, world: Intracomm) -> None:
    import cupy

    from hpcmp.comm.mpi import MpiCommunicator

    control = MpiCommunicator(world.Dup())
    for _ in range(3):  # in the later rounds buffers are used again
        assert not differences(comm, control, cupy)
    control.close()


def test_a_call_follows_the_work_before_it_and_precedes_the_work_after_it(comm: Layouts) -> None:
    import cupy

    x = cupy.zeros(1 << 20)
    for i in range(20):
        x += i * (comm.rank + 1)  # queued, and perhaps not yet done when the reduction is started
        x = comm.all_reduce(x).wait() / comm.size
        cupy.full(1 << 20, np.nan)  # takes the memory that the reduction has just given back
    np.testing.assert_allclose(to_host(x), 190 * (comm.size + 1) / 2)


def test_buffers_are_not_used_again_too_early(comm: Layouts) -> None:
    """Also those that the caller drops: arrays that are sent, and the contiguous copies that are made of views."""
    import cupy

    n, rank, size = 64, comm.rank, comm.size
    shapes = np.arange(n * n, dtype=np.float64).reshape(n, n)
    sums, sent, received = [], [], []
    for i in range(20):
        x = cupy.asarray(shapes) * (rank + 1) + i
        sums.append(comm.all_reduce(x.T))
        if rank + 1 < size:
            sent.append(comm.send((x + 1).T, rank + 1, i))
        cupy.full((n, n), np.nan)  # queued on memory that goes back to the pool at once
        if rank > 0:
            received.append(comm.recv((n, n), np.float64, rank - 1, i, like=x))
        del x
        cupy.full((n, n), np.nan)
    total = size * (size + 1) / 2
    for i, pending in enumerate(sums):
        np.testing.assert_array_equal(to_host(pending.wait()), shapes.T * total + i * size)
    for i, pending in enumerate(received):
        np.testing.assert_array_equal(to_host(pending.wait()), shapes.T * rank + i + 1)
    for pending in sent:
        pending.wait()


def test_a_message_that_waits_does_not_meet_work_on_the_memory_that_it_gets(comm: Layouts, world: Intracomm) -> None:
    import cupy

    n, rank = 100, comm.rank
    for i in range(10):
        sent = comm.send(cupy.full(n, float(rank)), rank + 1) if rank + 1 < comm.size else None
        if i > 0:  # a communicator's first message is collective
            world.Barrier()
        if rank > 0:
            cupy.full(n, np.nan)  # queued on memory that goes back to the pool at once
            received = comm.recv((n,), np.float64, rank - 1, like=cupy.empty(0))
            np.testing.assert_array_equal(to_host(received.wait()), rank - 1)
        if sent:
            sent.wait()


@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_every_layout_gives_the_serial_model(backend: str, world: Intracomm, style: str) -> None:
    keys = {"backend": "nccl" if backend == "nccl" else "mpi", "cuda_aware": "yes" if backend == "direct" else "no"}
    host = small(style=style, dropout=0.1)
    source = source_of(host)
    with engine(host) as serial:
        wanted = [serial.step(i, *source(i, serial.share)) for i in range(2)]
    for config in layouts(small(style=style, dropout=0.1, device="cuda", **keys), world.size):
        with engine(config, world) as e:
            found: list[Result] = [e.step(i, *source(i, e.share)) for i in range(2)]
        for here, there in zip(found, wanted, strict=True):
            assert dataclasses.astuple(here) == pytest.approx(dataclasses.astuple(there), rel=1e-11), short(
                config.layout
            )
