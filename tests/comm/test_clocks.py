"""How far clocks are apart, found by messages."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from hpcmp.comm.clocks import ahead

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


@pytest.mark.mpi
def test_how_far_clocks_are_ahead(world: Intracomm) -> None:
    """To within the error that is told, and that error is less than a message may take."""
    others = range(1, world.size, 2)  # not all of them answer
    found = ahead(world, others, lambda: time.monotonic() + 1000 * world.rank)
    if world.rank:
        assert found == {}
        return
    assert list(found) == list(others)
    for rank, (seconds, error) in found.items():
        assert 0 < error < 10 and abs(seconds - 1000 * rank) <= error + 1e-9
