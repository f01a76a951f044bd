"""float16 and bfloat16 over MPI, which has no type for them: moved bit by bit, summed in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp import partition
from hpcmp.arrays import Array, dtype_of
from hpcmp.comm.base import Communicator, Pending
from hpcmp.comm.mesh import Mesh
from hpcmp.comm.mpi import MpiCommunicator

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

Call = Callable[[Communicator, Array], Pending]


def draw(c: Communicator, *shape: int) -> Array:
    """Numbers of every magnitude that bfloat16 and float16 both hold exactly: of 8 bits."""
    x = np.random.default_rng((c.rank, *shape)).normal(size=shape)
    return x.astype(dtype_of("bfloat16")).astype(np.float16).astype(dtype_of("bfloat16")).astype(np.float32)


def mine(c: Communicator, n: int) -> int:
    return partition.sizes(n, c.size)[c.rank]


def received(c: Communicator, x: Array) -> Pending:
    """A ring: what the rank before sends."""
    if c.size == 1:
        return Pending(x)
    sent = c.send(x, (c.rank + 1) % c.size)
    y = c.recv(x.shape, x.dtype, (c.rank - 1) % c.size, like=x).wait()
    sent.wait()
    return Pending(y)


MOVES: dict[str, Call] = {
    "all_gather": lambda c, x: c.all_gather(x[: mine(c, 5)], 0, 5),
    "all_gather along an inner axis": lambda c, x: c.all_gather(x, 1),
    "all_gather_v": lambda c, x: c.all_gather_v(x[: c.rank], list(range(c.size))),
    "all_to_all": lambda c, x: c.all_to_all(x, 0, 1),
    "all_to_all_v": lambda c, x: c.all_to_all_v(x[: c.size], [1] * c.size, [1] * c.size),
    "broadcast": lambda c, x: c.broadcast(x, c.size - 1),
    "broadcast of a view": lambda c, x: c.broadcast(x.T, 0),
    "send": received,
    "max": lambda c, x: c.all_reduce(x, "max"),
}
SUMS: dict[str, Call] = {
    "all_reduce": lambda c, x: c.all_reduce(x),
    "all_reduce in place": lambda c, x: c.all_reduce(x, out=x),
    "all_reduce of nothing": lambda c, x: c.all_reduce(x[:0]),
    "reduce_scatter": lambda c, x: c.reduce_scatter(x),
    "reduce_scatter along an inner axis": lambda c, x: c.reduce_scatter(x, 1),
    "reduce_scatter_v": lambda c, x: c.reduce_scatter_v(x[: c.size], [1] * c.size),
}


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("few", [False, True], ids=["", "in pieces"])
@pytest.mark.parametrize("staged", [False, True], ids=["", "staged"])
def test_as_float32_and_rounded_once(world: Intracomm, name: str, few: bool, staged: bool, patch_largest: Any) -> None:
    dtype = dtype_of(name)
    patch_largest(7 if few else 2**31 - 1)
    with Mesh(world, dp=world.size, staged=staged) as mesh:
        c = mesh["dp"]
        for call_name, call in (MOVES | SUMS).items():
            x = draw(c, 9, 4)
            wanted = call(c, x.copy()).wait().astype(dtype)
            found = call(c, x.astype(dtype)).wait()
            assert found.dtype == dtype and found.shape == wanted.shape, call_name
            np.testing.assert_array_equal(found, wanted, call_name)


@pytest.fixture
def patch_largest(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda largest: monkeypatch.setattr(MpiCommunicator, "largest", largest)


@pytest.mark.mpi(min_size=2)
def test_a_sum_does_not_get_stuck(world: Intracomm) -> None:
    """256 + 1 + 1 + ... : in bfloat16, one by one, it would stay 256."""
    one = np.full(3, 256 if world.rank == 0 else 1, dtype_of("bfloat16"))
    with Mesh(world, dp=world.size) as mesh:
        total = mesh["dp"].all_reduce(one).wait()
        part = mesh["dp"].reduce_scatter(np.repeat(one[:1], world.size)).wait()
    wanted = np.float32(255 + world.size).astype(one.dtype)  # 258 has 8 bits, 257 is rounded to 256
    assert (total == wanted).all() and (part == wanted).all()
