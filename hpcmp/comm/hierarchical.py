"""Sums over several nodes in phases, so that a message crosses the network once for each node and not each rank.

    p_i = part i of the sum over the ranks of a node      reduce_scatter, inside each node
    q_i = the sum over the nodes of their p_i             all_reduce, between ranks of different nodes
    y   = [q_0, q_1, ...]                                 all_gather, inside each node

With k ranks on each of m nodes a rank sends 2 (m - 1) / m of 1 / k of the message to another node; in the recursive
doubling and halving that MPIs take for many sizes, a rank's whole message goes over the network several times. (A ring
in the order of nodes sends little more over the network than this, but takes 2 (k m - 1) steps instead of
2 (k - 1) + 2 (m - 1).) NCCL does all this by itself.

Halving and doubling is for powers of two: of other numbers some ranks first send all they have, and get the whole sum
at the end. So the sum between m nodes is then two phases: each rank gets every other's share of its part, adds these up
in the order of the nodes, and gathers the shares again, in two steps that send (m - 1) / m each.
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
SHORT = 2**12  # bytes from one node's rank to another's, below which MPI's fewer and longer messages are as good
LAST = 4  # the phases of a sum


def worthwhile(nodes: Sequence[int], choice: str = "auto") -> bool:
    """Whether the ranks of a group, on ``nodes``, sum in phases: several nodes, with "auto" of several ranks each or of
    a number that is no power of two."""
    ranks = Counter(nodes).values()
    if choice == "no" or len(ranks) == 1:
        return False
    return not _is_power_of_two(len(ranks)) or (max if choice == "yes" else min)(ranks) > 1


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
        self.inside, self.inside_again = within(inside), within(again)
        across = _split(comm, min(place, self.parts))
        self.across, self.across_again = MpiCommunicator(across), MpiCommunicator(_split(across, 0))
        self.holds = place < self.parts
        for phase in self._phases():
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
        before = LAST
        for each in self.sums:
            while each.phase < before and each.pending.test():
                each.next()
            before = each.phase
        self.sums = [each for each in self.sums if each.phase < LAST or not each.pending.test()]
        if not self.sums and self.advance in DRIVERS:
            DRIVERS.remove(self.advance)

    def close(self) -> None:
        for phase in self._phases():
            phase.close()
        super().close()

    def _phases(self) -> tuple[MpiCommunicator, ...]:
        return self.inside, self.across, self.across_again, self.inside_again


def _is_power_of_two(m: int) -> bool:
    return m & (m - 1) == 0


def _split(comm: MPI.Intracomm, colour: int) -> MPI.Intracomm:
    return cast("MPI.Intracomm", comm.Split(colour))


class _Sum:
    """One message on its way, in ``phase`` 1 to ``LAST``; to ``Pending`` it is a request, with a request's names."""

    def __init__(self, group: HierarchicalCommunicator, x: Array) -> None:
        self.group, self.phase = group, 1
        local, m = group.inside.size, group.across.size
        self.rows = partition.sizes(x.size, group.parts) + [0] * (local - group.parts)
        self.mine = self.rows[group.inside.rank]
        self.shares = partition.sizes(self.mine, m)  # of this rank's part, where its sum is made by exchanges
        self.exchanged = not _is_power_of_two(m) and self.mine * x.itemsize >= m * SHORT
        self.pending = group.inside.reduce_scatter_v(x, self.rows)

    def next(self) -> None:
        """Start the next phase with what the one before yields."""
        part, self.phase, across = self.pending.wait(), self.phase + 1, self.group.across
        if self.phase == LAST:
            self.pending = self.group.inside_again.all_gather_v(part, self.rows)
        elif not self.group.holds:
            self.pending = Pending(part)
        elif self.phase == 3:
            self.pending = self.group.across_again.all_gather_v(part, self.shares) if self.exchanged else Pending(part)
        elif self.exchanged:
            share = self.shares[across.rank]
            self.pending = across.all_to_all_v(part, self.shares, [share] * across.size)
            self.pending = _then(self.pending, lambda y: y.reshape(across.size, share).sum(0))
        else:
            self.pending = across.all_reduce(part, out=part)

    def Test(self) -> bool:
        self.group.advance()
        return self not in self.group.sums

    def Wait(self) -> None:
        """Nothing: it is in DRIVERS until it is there, and ``Pending.wait`` calls those before this."""
