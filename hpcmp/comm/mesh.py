"""Mesh: a named Cartesian grid of ranks, with a communicator for any set of its axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from .base import Communicator, Solo
from .fit import check_cuts, check_size, divisors
from .layouts import Layouts
from .recorder import Flight
from .topology import Topology, find
from .traffic import Traffic

if TYPE_CHECKING:
    from mpi4py import MPI

    from .check import Check
    from .mpi import MpiCommunicator

#: The axes over which parameters are alike, and data differ: replicas, parts of the sequence, the z axis of a 3-D grid.
DATA = ("dp", "cp", "tp_z")


class Mesh:
    """``Mesh(comm, dp=2, pp=2, tp=4)``: a grid of ranks, ``mesh["tp"]`` the communicator along one of its axes.

    =======  ========================================================================
    axis     the ranks along it
    =======  ========================================================================
    dp       hold the same weights and take other samples
    pp       hold other layers; ``ends`` are the first and the last of them
    cp       take other positions of the same samples; cp is cut into ring x ulysses
    tp_z     take other samples of a replica: the z of a 3-D grid
    tp_y     share the inner axis of each layer's weights: the y of a 3-D grid
    tp       share each layer: its heads and columns
    =======  ========================================================================

    ``mesh["dp", "tp"]`` is the group along several axes: the ranks that share this rank's place on all others. dp x cp
    x tp_z, numbered in this order, is also cut into edp x ep, for experts, and into copy x shard and ecopy x eshard (of
    edp), for what ZeRO shards: in each the second varies fastest. One group is made of axes of one such cut.

    The caller's ranks are sorted by node (``topology``, found if it is not given) and then placed in C order of the
    axes, the last varying fastest: ``tp`` stays on a node, and ``dp`` crosses nodes. ``rank`` is the number in this
    order, the one that all groups and ``gather_objects`` go by; rank 0 is the caller's. ``spans`` tells which axes lie
    within a node.

    A size that is not given is 1; a group of one needs no MPI: ``Mesh()`` is the serial mesh. The caller's communicator
    is split, never used itself; ``close`` frees all that the mesh made. A group is made when first asked for,
    which is collective over that group alone.

    backend: "mpi", "nccl", or "auto" (NCCL for arrays on a GPU, MPI for arrays on the host). staged: whether MPI gets
    host copies of device arrays instead of device pointers. hierarchical: whether MPI's large sums go through a node's
    ranks first (``hierarchical.py``): "auto" where several of a node's ranks are in a group of several nodes.
    shared_memory: whether ranks of one node exchange host arrays through memory that they share (``window.py``), of
    which each has ``window_mb`` MiB in each group: "auto" where that is faster than MPI and there is a core for every
    rank; "yes" always. check: whether ranks compare each collective before it starts (``check.py``).
    Raises InputError for sizes that do not fit the ranks or one another.
    """

    axes = ("dp", "pp", "cp", "tp_z", "tp_y", "tp")

    def __init__(
        self,
        comm: MPI.Intracomm | None = None,
        *,
        dp: int = 1,
        pp: int = 1,
        cp: int = 1,
        tp_z: int = 1,
        tp_y: int = 1,
        tp: int = 1,
        ulysses: int = 1,
        ep: int = 1,
        shard: int = 1,
        device: str = "cpu",
        backend: str = "auto",
        staged: bool = False,
        topology: Topology | None = None,
        hierarchical: Literal["auto", "yes", "no"] = "auto",
        shared_memory: Literal["auto", "yes", "no"] = "auto",
        window_mb: float = 6,
        check: bool = False,
    ) -> None:
        self.shape = {"dp": dp, "pp": pp, "cp": cp, "tp_z": tp_z, "tp_y": tp_y, "tp": tp}
        self.size = math.prod(self.shape.values())
        cuts = {"ulysses": ulysses, "ep": ep, "shard": shard}
        check_size(self.shape, 1 if comm is None else comm.size, **cuts)
        check_cuts(dp=dp, cp=cp, tp_z=tp_z, **cuts)
        self.parts = {"ulysses": ulysses, "ep": ep, "shard": shard, "eshard": max(1, shard // ep)}
        self.device, self.staged = device, staged
        self.nccl = backend == "nccl" or (backend == "auto" and device == "cuda")
        self.hierarchical = hierarchical
        found = topology or find(comm)
        if len(found.nodes) != self.size:
            raise ValueError(f"mesh: the topology is of {len(found.nodes)} ranks, and there are {self.size}")
        self.topology, self.sorted = found.placed, not found.in_order
        self.comm: MPI.Intracomm | None = None
        if comm is not None:
            from .survive import hold

            self.comm = hold(cast("MPI.Intracomm", comm.Split(0, found.order.index(comm.rank))))
        self.rank = 0 if self.comm is None else self.comm.rank
        #: The numbers of all ranks in MPI's world, those that mpirun and srun go by.
        self.launched = [0] if self.comm is None else _launched(self.comm)
        self.flight = Flight("all", self.launched)
        self._checks: list[Check] | None = [] if check else None
        self._window = self._within(shared_memory, int(window_mb * 2**20))
        self._places = self.place(np.arange(self.size))
        self._groups: dict[frozenset[str], Communicator] = {}

    @property
    def coordinates(self) -> dict[str, int]:
        """This rank's place on every axis."""
        return {axis: int(places[self.rank]) for axis, places in self._places.items()}

    def place(self, rank: Any) -> dict[str, Any]:
        """A rank's place (that of each, of an array of ranks) on every axis, those of the cuts included."""
        place = {}
        for axis, n in reversed(self.shape.items()):
            rank, place[axis] = divmod(rank, n)
        data = (place["dp"] * self.shape["cp"] + place["cp"]) * self.shape["tp_z"] + place["tp_z"]
        place["ring"], place["ulysses"] = divmod(place["cp"], self.parts["ulysses"])
        place["edp"], place["ep"] = divmod(data, self.parts["ep"])
        place["copy"], place["shard"] = divmod(data, self.parts["shard"])
        place["ecopy"], place["eshard"] = divmod(place["edp"], self.parts["eshard"])
        return place

    def spans(self) -> dict[str, int]:
        """Over how many nodes the groups along each axis reach, at most: 1 for an axis within a node."""
        nodes, found = np.reshape(self.topology.nodes, tuple(self.shape.values())), {}
        for i, axis in enumerate(self.axes):
            along = np.sort(np.moveaxis(nodes, i, -1), -1)
            found[axis] = 1 + int((np.diff(along) != 0).sum(-1).max())
        return found

    def describe(self) -> str:
        """Where the mesh lies, on one line: ``4 nodes of 8 ranks: tp, cp within a node; dp over 4``."""
        where = f"{self.topology}{', sorted by node' * self.sorted}"
        spans = {axis: nodes for axis, nodes in self.spans().items() if self.shape[axis] > 1}
        within = ", ".join(axis for axis in reversed(spans) if spans[axis] == 1)
        over = [f"{axis} over {nodes}" for axis, nodes in spans.items() if nodes > 1]
        if not over:
            return where
        return f"{where}: {'; '.join([f'{within} within a node', *over] if within else over)}"

    def advice(self) -> str:
        """What would keep each tp group on one node, if some groups are cut by the end of one; "" if all is well."""
        tp, common = self.shape["tp"], math.gcd(*self.topology.sizes)
        if self.spans()["tp"] == 1 or tp > max(self.topology.sizes):
            return ""
        fits = ", ".join(str(n) for n in divisors(common) if n > 1) or "no size but 1"
        return f"layout.tp = {tp} crosses nodes, which is slow: {self.topology}; {fits} would stay within them"

    def __getitem__(self, axes: str | tuple[str, ...]) -> Communicator:
        names = frozenset((axes,) if isinstance(axes, str) else axes)
        if names not in self._groups:
            self._groups[names] = self._make(names, self.members(names))
        return self._groups[names]

    def members(self, axes: frozenset[str]) -> list[int]:
        """The ranks of this rank's group along ``axes``, in order."""
        free, here, last = set(axes) - {"ends"}, self.coordinates, self.shape["pp"] - 1
        cut = next((cut for cut in _CUTS if free <= {*cut, *_OTHERS}), None)
        if cut is None:
            raise ValueError(f"mesh: no group along {sorted(axes)}: not all are axes, or not of one cut")
        mine = np.ones(self.size, bool)
        if "ends" in axes:
            if here["pp"] not in (0, last):
                raise ValueError("mesh: a rank between the ends of the pipeline is in no group along 'ends'")
            free.add("pp")
            mine = np.isin(self._places["pp"], (0, last))
        for axis in {*cut, *_OTHERS} - free:
            mine &= self._places[axis] == here[axis]
        return [int(rank) for rank in np.flatnonzero(mine)]

    def traffic(self) -> dict[tuple[str, ...], Traffic]:
        """What this rank has sent since ``forget_traffic``, by the axes of the group: see ``traffic.py``."""
        found = {}
        for names, group in self._groups.items():
            if group.traffic:
                found[tuple(axis for axis in _NAMES if axis in names)] = Traffic(group.traffic)
        return found

    def forget_traffic(self) -> None:
        """Count from here on."""
        for group in self._groups.values():
            group.traffic.clear()

    def gather_objects(self, value: Any) -> list[Any]:
        """Small Python objects of every rank, in order (control plane: sizes, digests, error texts; never arrays)."""
        if self.comm is None:
            return [value]
        with self.flight.blocking("gather_objects"):
            return self.comm.allgather(value)

    def close(self) -> None:
        """Free every communicator that the mesh made; collective."""
        for group in self._groups.values():
            group.close()
            if isinstance(group, Layouts) and group.flight:
                group.flight.close()
        self._groups.clear()
        for check in self._checks or ():
            check.close()
        self.flight.close()
        if self.comm is not None:
            self.comm.Free()
            self.comm = None

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:  # freeing is collective: after an error the other ranks may not come
            self.close()

    def _make(self, names: frozenset[str], ranks: list[int]) -> Communicator:
        if len(ranks) == 1 or self.comm is None:
            return Solo()
        axes = ", ".join(axis for axis in _NAMES if axis in names)
        flight = Flight(axes, [self.launched[rank] for rank in ranks], begun=-1)  # its making is its number 0
        with flight.blocking("the making"):
            made = self._communicator(ranks)
            made.flight = flight
            if self._checks is not None:
                from .check import Check

                made.check = Check(made.duplicate())
                self._checks.append(made.check)
        return made

    def _communicator(self, ranks: list[int]) -> Layouts:
        assert self.comm is not None
        from .hierarchical import LEAST, HierarchicalCommunicator, worthwhile
        from .mpi import MpiCommunicator

        group = self.comm.group.Incl(ranks)
        comm = self.comm.Create_group(group)
        group.Free()
        nodes = [self.topology.nodes[rank] for rank in ranks]
        if not self.nccl and worthwhile(nodes, self.hierarchical):
            least = 0 if self.hierarchical == "yes" else LEAST
            within = self._window or MpiCommunicator
            return HierarchicalCommunicator(comm, nodes, staged=self.staged, least=least, within=within)
        if self._window and len(set(nodes)) == 1:
            return self._window(comm)
        made = MpiCommunicator(comm, staged=self.staged)
        if not self.nccl:
            return made
        from .nccl import NcclCommunicator

        return NcclCommunicator(made)

    def _within(self, choice: str, size: int) -> Callable[[MPI.Intracomm], MpiCommunicator] | None:
        """What makes the communicator of a group within a node, where that is not an MpiCommunicator."""
        if self.comm is None or self.size == 1 or self.nccl or self.device != "cpu" or choice == "no":
            return None
        from .window import EVERY, SIZES, cores_for_all, shared

        if choice == "auto" and not cores_for_all(self.topology.nodes, self.comm):
            return None
        return partial(shared, size=size, sizes=SIZES if choice == "auto" else EVERY, staged=self.staged)


#: The ways to cut dp x cp x tp_z: a group along some of these axes is along axes of one of the cuts.
_CUTS = (DATA, ("dp", "ring", "ulysses", "tp_z"), ("edp", "ep"), ("copy", "shard"), ("ecopy", "eshard", "ep"))
_OTHERS = ("pp", "tp_y", "tp")
_NAMES = tuple(dict.fromkeys((*Mesh.axes, "ends", *(axis for cut in _CUTS for axis in cut))))


def _launched(comm: MPI.Intracomm) -> list[int]:
    from mpi4py import MPI

    found = comm.group.Translate_ranks(None, MPI.COMM_WORLD.group)
    return list(range(comm.size)) if MPI.UNDEFINED in found else [int(rank) for rank in found]
