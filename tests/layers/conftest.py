"""The group of all ranks, and the layouts that every layer is tested in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hpcmp.comm.base import Communicator
from hpcmp.layers.parallel import ModelParallel

from .common import place


@pytest.fixture(scope="session")
def tp() -> Iterator[Communicator]:
    """All ranks of the test as one tensor-parallel group."""
    from mpi4py import MPI

    from hpcmp.comm.mesh import Mesh

    with Mesh(MPI.COMM_WORLD, tp=MPI.COMM_WORLD.size) as mesh:
        yield mesh["tp"]


@pytest.fixture(params=[(5, False), (13, True), (2, True)], ids=lambda p: f"S{p[0]}{'-sequence' * p[1]}")
def parallel(request: pytest.FixtureRequest, tp: Communicator) -> ModelParallel:
    """Whole activations, then sequence shards: uneven ones, and fewer positions than ranks."""
    length, sequence = request.param
    return place(length, tp, sequence=sequence)
