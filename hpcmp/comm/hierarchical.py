"""Sums over several nodes in three phases, so that a message crosses the network once for each node and not each rank.

    p_i = part i of the sum over the ranks of a node      reduce_scatter, inside each node
    q_i = the sum over the nodes of their p_i             all_reduce, between ranks of different nodes
    y   = [q_0, q_1, ...]                                 all_gather, inside each node

With k ranks on each of m nodes a rank sends 2 (m - 1) / m of 1 / k of the message to another node; in the recursive
doubling and halving that MPIs take for many sizes, a rank's whole message goes over the network several times. (A ring
in the order of nodes sends little more over the network than this, but takes 2 (k m - 1) steps instead of
2 (k - 1) + 2 (m - 1).) NCCL does all this by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from .. import partition
from ..arrays import Array, is_half, wide
from .base import DRIVERS, Op, Pending
from .layouts import _then
from .mpi import MpiCommunicator, _into

if TYPE_CHECKING:
    from mpi4py import MPI

LEAST = 256 * 2**10  # bytes of a message below which the calls of two more phases cost more than they save


def worthwhile(nodes: Sequence[int], choice: str = "auto") -> bool:
    """Whether the ranks of a group, on ``nodes``, sum in phases: several nodes, with "auto" of several ranks each."""
    ranks = Counter(nodes).values()
    return choice != "no" and len(ranks) > 1 and (max if choice == "yes" else min)(ranks) > 1


class HierarchicalCommunicator(MpiCommunicator):
    """An ``MpiCommunicator`` whose sums of ``least`` bytes or more go in phases; ``nodes`` has the node of each rank.

    The parts p_i are as many as the smallest node has ranks, and belong to the first ranks of each node; its further
    ranks have none. So nodes may have any numbers of ranks.

    MPI knows of one phase only. The next one is started by ``test`` and ``wait``, of any ``Pending`` of the process: a
    rank must not go into an MPI call of another kind while sums are under way that others wait for. Every phase takes
    the messages in the order in which they were started, as MPI demands, and each has a communicator of its own;
    ``within`` makes those of a node's ranks.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        nodes: Sequence[int],
        *,
        staged: bool = False,
        least: int = LEAST,
        within: Callable[[MPI.Intracomm], MpiCommunicator] = MpiCommunicator,
    ) -> None:
        super().__init__(comm, staged=staged)
        self.least = least
        place = list(nodes[: self.rank]).count(nodes[self.rank])  # this rank's number on its node
        self.parts = min(Counter(nodes).values())
        inside = _split(comm, nodes[self.rank])
        again = _split(inside, 0)
        self.inside, self.again = within(inside), within(again)
        self.across = MpiCommunicator(_split(comm, min(place, self.parts)))
        self.holds = place < self.parts
        for phase in (self.inside, self.across, self.again):
            phase.traffic, phase.flight = self.traffic, None
        self.sums: list[_Sum] = []

    def all_reduce(self, x: Array, op: Op = "sum", out: Array | None = None) -> Pending:
        if op != "sum" or x.size * self._summed(x) < self.least:
            return super().all_reduce(x, op, out)
        return self._start("all_reduce", x, x.size, None, None, self._in_phases, x, out)

    def _in_phases(self, x: Array, out: Array | None) -> Pending:
        if is_half(x.dtype):
            whole = self._in_phases(x.astype(wide(x.dtype)), None)
            return _then(whole, lambda y: _into(out, y.astype(x.dtype)))
        send = self.transport.outgoing(x)
        started = _Sum(self, send.reshape(-1))
        if not self.sums:
            DRIVERS.append(self.advance)
        self.sums.append(started)

        def finish(_: Array) -> Array:
            return _into(out, self.transport.arrived(started.pending.wait().reshape(x.shape), x))

        return Pending(send, [started], finish)

    def advance(self) -> None:
        """Start every phase whose turn has come; forget the sums that are there."""
        before = 3
        for each in self.sums:
            while each.phase < before and each.pending.test():
                each.next()
            before = each.phase
        self.sums = [each for each in self.sums if each.phase < 3 or not each.pending.test()]
        if not self.sums and self.advance in DRIVERS:
            DRIVERS.remove(self.advance)

    def close(self) -> None:
        for phase in (self.inside, self.across, self.again):
            phase.close()
        super().close()


def _split(comm: MPI.Intracomm, colour: int) -> MPI.Intracomm:
    return cast("MPI.Intracomm", comm.Split(colour))


class _Sum:
    """One message on its way, in ``phase`` 1, 2 or 3; to ``Pending`` it is a request, with a request's names."""

    def __init__(self, group: HierarchicalCommunicator, x: Array) -> None:
        self.group, self.phase = group, 1
        local = group.inside.size
        self.rows = partition.sizes(x.size, group.parts) + [0] * (local - group.parts)
        self.pending = group.inside.reduce_scatter_v(x, self.rows)

    def next(self) -> None:
        """Start the next phase with what the one before yields."""
        part, self.phase = self.pending.wait(), self.phase + 1
        if self.phase == 3:
            self.pending = self.group.again.all_gather_v(part, self.rows)
        elif self.group.holds:
            self.pending = self.group.across.all_reduce(part, out=part)
        else:
            self.pending = Pending(part)

    def Test(self) -> bool:
        self.group.advance()
        return self not in self.group.sums

    def Wait(self) -> None:
        """Nothing: it is in DRIVERS until it is there, and ``Pending.wait`` calls those before this."""
