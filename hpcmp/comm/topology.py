"""Where ranks lie on the machine: which of them share a node, and which nodes share a switch."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

from ..batch import switches_above as switches_above
from ..errors import InputError

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True)
class Topology:
    """The node of every rank of a communicator.

    nodes: of each rank, numbered in the order of the nodes' lowest ranks. names: of each node, its host. switches: of
    each node, the names of the switches above it, outermost first, where the scheduler tells them ("" where not).
    """

    nodes: tuple[int, ...] = (0,)
    names: tuple[str, ...] = ()
    switches: tuple[str, ...] = ()

    @cached_property
    def sizes(self) -> list[int]:
        """How many ranks each node has."""
        count = Counter(self.nodes)
        return [count[node] for node in range(len(count))]

    @cached_property
    def order(self) -> list[int]:
        """The ranks, those of a node one after the other, and the nodes of a switch; rank 0 remains the first.

        Switches and nodes stand in the order of their lowest ranks, so that ranks placed in blocks stay as they are.
        """
        first: dict[tuple[str, ...], int] = {}
        paths = [tuple(path.split(".")) for path in self.switches or [""] * len(self.sizes)]
        for node, path in enumerate(paths):
            for depth in range(len(path)):
                first.setdefault(path[: depth + 1], node)
        keys = [[*(first[path[: depth + 1]] for depth in range(len(path))), node] for node, path in enumerate(paths)]
        return sorted(range(len(self.nodes)), key=lambda rank: (keys[self.nodes[rank]], rank))

    @cached_property
    def placed(self) -> Topology:
        """The topology of the ranks in ``order``; the nodes keep their numbers."""
        return Topology(tuple(self.nodes[rank] for rank in self.order), self.names, self.switches)

    @property
    def in_order(self) -> bool:
        """Whether the ranks are in ``order`` as they are."""
        return self.order == list(range(len(self.nodes)))

    def __str__(self) -> str:
        least, most = min(self.sizes), max(self.sizes)
        ranks = f"{least} to {most} ranks" if least < most else f"{most} rank{'s' * (most > 1)}"
        if len(self.sizes) == 1:
            return f"{ranks} on one node"
        switches = len({path for path in self.switches if path})
        return f"{len(self.sizes)} nodes of {ranks}" + (f" on {switches} switches" if switches > 1 else "")


def find(comm: MPI.Intracomm | None) -> Topology:
    """The topology of ``comm``'s ranks (None: this process alone). Collective.

    A node is where ranks share memory, as MPI says (MPI_COMM_TYPE_SHARED). HPCMP_NODES, a list such as 0,0,1,1, puts
    each rank of the job on a node of that number instead, for tests on one machine: rank i of the job takes number i,
    the list beginning again after its end. Raises InputError for another text in HPCMP_NODES.
    """
    if comm is None:
        return Topology()
    from mpi4py import MPI

    from .survive import hold

    if (forced := os.environ.get("HPCMP_NODES")) is not None:
        node, switch = planned(forced, MPI.COMM_WORLD.rank), ""
        name = f"node {node} of HPCMP_NODES"
    else:
        shared = hold(cast("MPI.Intracomm", comm.Split_type(MPI.COMM_TYPE_SHARED)))
        node, name, switch = shared.bcast(comm.rank), socket.gethostname(), switches_above(os.environ)
        shared.Free()
    return of_keys(comm.allgather((node, name, switch)))


def planned(text: str, rank: int) -> int:
    """The node of a rank of the job by HPCMP_NODES."""
    numbers = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() for word in numbers):
        raise InputError(f"HPCMP_NODES={text}: expected a node's number for each rank, such as 0,0,1,1")
    return int(numbers[rank % len(numbers)])


def of_keys(ranks: Sequence[tuple[int, str, str]]) -> Topology:
    """The topology of ranks that each name (a number of their node's own, its host, the switches above it)."""
    number: dict[int, int] = {}
    for node, _, _ in ranks:
        number.setdefault(node, len(number))
    named = {node: (name, switch) for node, name, switch in reversed(ranks)}
    names, switches = zip(*(named[node] for node in number), strict=True)
    return Topology(tuple(number[node] for node, _, _ in ranks), names, switches)
