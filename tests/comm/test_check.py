"""Checked collectives: right results, and the same named error on every rank where the ranks' calls differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.comm.base import DRIVERS, Communicator
from hpcmp.comm.mesh import Mesh
from hpcmp.comm.topology import Topology
from hpcmp.errors import MismatchError
from tests.comm.test_traffic import calls

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


def dtype(c: Communicator, first: bool) -> Any:
    return c.all_reduce(np.ones(8, np.float32 if first else np.int32))


def count(c: Communicator, first: bool) -> Any:
    return c.all_reduce(np.ones(80000 if first else 8))


def reduction(c: Communicator, first: bool) -> Any:
    return c.all_reduce(np.ones(8), "max" if first else "sum")


def root(c: Communicator, first: bool) -> Any:
    return c.broadcast(np.ones(8), 0 if first else 1)


def operation(c: Communicator, first: bool) -> Any:
    return c.reduce_scatter(np.ones(c.size)) if first else c.all_gather(np.ones(1))


def order(c: Communicator, first: bool) -> Any:
    """Two sums alike, which rank 0 takes in the other order: each would get the other's, without a word."""
    if first:
        b = c.all_reduce(np.ones(8))
        return b, c.all_reduce(np.zeros(8))
    return c.all_reduce(np.zeros(8)), c.all_reduce(np.ones(8))


def parts(c: Communicator, first: bool) -> Any:
    rows = [2, 0, *[1] * (c.size - 2)] if first else [1] * c.size
    return c.all_gather_v(np.ones(rows[c.rank]), rows)


def exchange(c: Communicator, first: bool) -> Any:
    sent = [3 if first else 1] * c.size
    return c.all_to_all_v(np.ones(sum(sent)), sent, [1] * c.size)


#: Each fault, and what the error says of it.
FAULTS: dict[Callable[[Communicator, bool], Any], tuple[str, ...]] = {
    dtype: ("collective 2 of dp differs", "rank 0: all_reduce (float32, 8) at ", ": all_reduce (int32, 8) at "),
    count: ("(float64, 80000)", "(float64, 8)"),
    reduction: ("all_reduce max (float64, 8)", "all_reduce (float64, 8)"),
    root: ("rank 0: broadcast (float64, 8, root 0)", "broadcast (float64, 8, root 1)"),
    operation: ("rank 0: reduce_scatter (", "all_gather ("),
    order: ("rank 0: all_reduce (float64, 8) at ", "test_check.py:"),
    parts: ("collective 2 of dp: all_gather", "differ in their parts"),
    exchange: ("rank 0 sends 3 elements to rank 0, which expects 1",),
}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("memory", ["no", "yes"])
@pytest.mark.fault(11)
def test_ranks_that_differ_get_the_same_error(
    world: Intracomm, fault: Callable[[Communicator, bool], Any], memory: Any
) -> None:
    mesh = Mesh(world, dp=world.size, check=True, shared_memory=memory)
    dp = mesh["dp"]
    assert dp.all_reduce(np.ones(3)).wait().tolist() == [world.size] * 3
    made = fault(dp, world.rank == 0)
    with pytest.raises(MismatchError) as caught:
        for pending in made if isinstance(made, tuple) else (made,):
            pending.wait()
    texts = set(world.allgather(str(caught.value)))
    assert len(texts) == 1
    for part in FAULTS[fault]:
        assert part in str(caught.value)


@pytest.mark.mpi
@pytest.mark.parametrize("choice", [{}, {"shared_memory": "yes"}, {"hierarchical": "yes"}])
def test_results_are_those_without_the_check(world: Intracomm, choice: dict[str, Any]) -> None:
    topology = Topology(tuple(rank * 2 // world.size for rank in range(world.size)))
    drivers = list(DRIVERS)
    with Mesh(world, dp=world.size, topology=topology, check=True, **choice) as mesh:
        dp = mesh["dp"]
        for dtype in (np.float32, np.float16):
            calls(dp, 13, dtype)
        own = np.full((3, 2), dp.rank)
        total = sum(range(dp.size))
        inplace = np.full(100, dp.rank, np.float64)
        pending = [dp.all_reduce(own), dp.all_reduce(inplace, out=inplace), dp.all_gather(own, 1)]
        assert (pending[2].wait() == np.repeat(range(dp.size), 2)).all()  # waited for in another order
        assert (pending[0].wait() == total).all() and (pending[1].wait() == total).all() and (inplace == total).all()
        while not pending[0].test():
            pass
    assert drivers == DRIVERS


@pytest.mark.mpi(min_size=2)
def test_a_root_may_call_from_a_line_of_its_own(world: Intracomm) -> None:
    with Mesh(world, dp=world.size, check=True) as mesh:
        if mesh.rank == 1:
            found = mesh["dp"].broadcast(np.arange(4), 1)
        else:
            found = mesh["dp"].broadcast(np.zeros(4, int), 1)
        assert found.wait().tolist() == [0, 1, 2, 3]


@pytest.mark.mpi(min_size=3)
def test_a_call_does_not_block(world: Intracomm) -> None:
    """The last rank comes to a collective after a message that another rank sends after its own call of it."""
    with Mesh(world, dp=world.size, check=True) as mesh:
        dp, x = mesh["dp"], np.ones(3)
        last = dp.size - 1
        if dp.rank == last:
            assert (dp.recv((3,), x.dtype, 0, like=x).wait() == 1).all()
        pending = dp.all_reduce(x)
        if dp.rank == 0:
            dp.send(x, last).wait()
        assert (pending.wait() == dp.size).all()
