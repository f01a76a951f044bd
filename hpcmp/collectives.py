"""Collectives as linear operators: each one names its adjoint, and backward applies it.

    <A x, y> = <x, A^T y>

=============  ========  =============  ========================================================
operator A     layout    adjoint A^T    where it stands in a transformer
=============  ========  =============  ========================================================
Copy           I -> V    AllReduce      enter a column-parallel linear (Megatron's f)
AllReduce      P -> I    Copy           leave a row-parallel linear (Megatron's g)
AllGather      V -> V    ReduceScatter  enter, with sequence parallelism
ReduceScatter  P -> V    AllGather      leave, with sequence parallelism
Split          I -> V    Gather         a replicated activation to sequence shards
Gather         V -> I    Split          sequence shards to a replicated activation
AllToAll       V -> V    AllToAll       sequence shards <-> head shards
=============  ========  =============  ========================================================

Layouts: I (invariant): the same array on every rank, counted once; V (varying): an array of its own on each rank;
P (partial): each rank holds a summand, so to the inner product it is as V. Shards are those of ``hpcmp.partition``:
along an axis whose length is not a multiple of the group's size, some ranks hold one more. A rank cannot tell the whole
length from its shard, so an operator that assembles shards, or whose adjoint does, takes it as ``total``: a number, or
a function that is asked at each call (the cursor's ``length``); None means equal shards.

The sequence-parallel pair is from Korthikanti et al., "Reducing activation recomputation in large transformer models",
2022, section 4.2.2; the operator view from Hewett and Grady, "A linear algebraic approach to model parallelism", 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from .arrays import Array
from .comm.base import Communicator, Pending
from .module import Module
from .wgrad import WGrad

Total = int | Callable[[], int] | None


class Collective(Module):
    """A linear map between the arrays of a group's ranks. ``start`` begins it; calling it also waits."""

    layout: ClassVar[str]

    def __init__(self, comm: Communicator, axis: int = 0, total: Total = None) -> None:
        self.comm, self.axis, self.total = comm, axis, total

    def start(self, x: Array) -> Pending:
        """Begin; ``wait()`` on what is returned yields A x."""
        raise NotImplementedError

    def __call__(self, x: Array) -> Array:
        return self.start(x).wait()

    def forward(self, x: Array) -> tuple[Array, None]:
        return self(x), None

    def backward(self, dy: Array, saved: Any, wgrad: WGrad) -> Array:
        return self.T(dy)

    @property
    def T(self) -> Collective:
        """The adjoint."""
        return ADJOINT[type(self)](self.comm, self.axis, self.total)

    def length(self) -> int | None:
        """``total`` as it is now."""
        return self.total() if callable(self.total) else self.total


class Copy(Collective):
    """y_r = x."""

    layout = "IV"

    def start(self, x: Array) -> Pending:
        return Pending(x)


class AllReduce(Collective):
    """y = sum_r x_r."""

    layout = "PI"

    def start(self, x: Array) -> Pending:
        return self.comm.all_reduce(x)


class AllGather(Collective):
    """y = [x_0, x_1, ...], of which each rank then uses its own copy."""

    layout = "VV"

    def start(self, x: Array) -> Pending:
        return self.comm.all_gather(x, self.axis, self.length())


class ReduceScatter(Collective):
    """y_r = part r of sum_q x_q."""

    layout = "PV"

    def start(self, x: Array) -> Pending:
        return self.comm.reduce_scatter(x, self.axis)


class Split(Collective):
    """y_r = part r of x."""

    layout = "IV"

    def start(self, x: Array) -> Pending:
        index = [slice(None)] * x.ndim
        index[self.axis] = self.comm.part(x.shape[self.axis])
        return Pending(x[tuple(index)])


class Gather(AllGather):
    """y = [x_0, x_1, ...], one value that every rank holds."""

    layout = "VI"


class AllToAll(Collective):
    """Cut ``x`` along ``axis[0]``, part r to rank r, and join what comes along ``axis[1]``.

    ``total`` is the pair of whole lengths of the two axes (either None for equal shards).
    """

    layout = "VV"

    def __init__(self, comm: Communicator, axis: tuple[int, int], total: tuple[Total, Total] = (None, None)) -> None:
        super().__init__(comm)
        self.split, self.concat = axis
        self.totals = total

    def start(self, x: Array) -> Pending:
        total = self.totals[1]
        return self.comm.all_to_all(x, self.split, self.concat, total() if callable(total) else total)

    @property
    def T(self) -> AllToAll:
        return AllToAll(self.comm, (self.concat, self.split), (self.totals[1], self.totals[0]))


ADJOINT: dict[type[Collective], type[Collective]] = {Copy: AllReduce, AllGather: ReduceScatter, Split: Gather}
ADJOINT |= {adjoint: operator for operator, adjoint in ADJOINT.items()}
