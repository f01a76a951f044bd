"""Mesh: a named Cartesian grid of ranks, with a communicator for any set of its axes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .base import Communicator, Solo

if TYPE_CHECKING:
    from mpi4py import MPI

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
    edp), for what ZeRO shards: in each the second varies fastest. One group is made of axes of one such cut. Ranks are
    placed in C order of the axes, the last varying fastest, so that ``tp`` stays on a node.

    A size that is not given is 1; a group of one needs no MPI: ``Mesh()`` is the serial mesh. The caller's communicator
    is duplicated, never used itself; ``close`` frees all that the mesh made. A group is made when first asked for,
    which is collective over that group alone.

    backend: "mpi", "nccl", or "auto" (NCCL for arrays on a GPU, MPI for arrays on the host). staged: whether MPI gets
    host copies of device arrays instead of device pointers.
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
    ) -> None:
        self.shape = {"dp": dp, "pp": pp, "cp": cp, "tp_z": tp_z, "tp_y": tp_y, "tp": tp}
        self.size = math.prod(self.shape.values())
        have = 1 if comm is None else comm.size
        if self.size != have:
            product = " x ".join(f"{axis}={n}" for axis, n in self.shape.items() if n > 1 or axis in ("dp", "pp", "tp"))
            raise InputError(f"layout: {product} needs {self.size} ranks, and there are {have}")
        data = dp * cp * tp_z
        cuts = (("ulysses", ulysses, cp, "cp"), ("ep", ep, data, "dp x cp"), ("shard", shard, data, "dp x cp"))
        for name, n, whole, of in cuts:
            if whole % n:
                fits = ", ".join(str(d) for d in range(1, whole + 1) if whole % d == 0)
                raise InputError(f"layout: {name}={n} does not divide {of} = {whole}; {fits} would fit")
        if shard % ep and ep % shard:
            raise InputError(f"layout: of shard={shard} and ep={ep}, one must divide the other")
        self.parts = {"ulysses": ulysses, "ep": ep, "shard": shard, "eshard": max(1, shard // ep)}
        self.device, self.staged = device, staged
        self.nccl = backend == "nccl" or (backend == "auto" and device == "cuda")
        self.comm = None if comm is None else comm.Dup()
        self.rank = 0 if comm is None else comm.rank
        self._groups: dict[frozenset[str], Communicator] = {}

    @property
    def coordinates(self) -> dict[str, int]:
        """This rank's place on every axis."""
        return self.place(self.rank)

    def place(self, rank: int) -> dict[str, int]:
        """A rank's place on every axis, those of the cuts of dp x cp x tp_z and of cp included."""
        place = {}
        for axis, n in reversed(self.shape.items()):
            rank, place[axis] = divmod(rank, n)
        data = (place["dp"] * self.shape["cp"] + place["cp"]) * self.shape["tp_z"] + place["tp_z"]
        place["ring"], place["ulysses"] = divmod(place["cp"], self.parts["ulysses"])
        place["edp"], place["ep"] = divmod(data, self.parts["ep"])
        place["copy"], place["shard"] = divmod(data, self.parts["shard"])
        place["ecopy"], place["eshard"] = divmod(place["edp"], self.parts["eshard"])
        return place

    def __getitem__(self, axes: str | tuple[str, ...]) -> Communicator:
        names = frozenset((axes,) if isinstance(axes, str) else axes)
        if names not in self._groups:
            self._groups[names] = self._make(self.members(names))
        return self._groups[names]

    def members(self, axes: frozenset[str]) -> list[int]:
        """The ranks of this rank's group along ``axes``, in order."""
        free, basis = set(axes) - {"ends"}, set(self.axes)
        for parts, whole in _CUTS:
            if free & set(parts):
                basis = basis - set(whole) | set(parts)
        if unknown := free - basis:
            raise ValueError(f"mesh: no group along {sorted(axes)}: {sorted(unknown)} is no axis, or not of one cut")
        here, last = self.coordinates, self.shape["pp"] - 1
        if "ends" in axes:
            if here["pp"] not in (0, last):
                raise ValueError("mesh: a rank between the ends of the pipeline is in no group along 'ends'")
            free.add("pp")
        places = ((rank, self.place(rank)) for rank in range(self.size))
        return [
            rank
            for rank, place in places
            if all(place[axis] == here[axis] for axis in basis - free)
            and ("ends" not in axes or place["pp"] in (0, last))
        ]

    def gather_objects(self, value: Any) -> list[Any]:
        """Small Python objects of every rank, in order (control plane: sizes, digests, error texts; never arrays)."""
        return [value] if self.comm is None else self.comm.allgather(value)

    def close(self) -> None:
        """Free every communicator that the mesh made; collective."""
        for group in self._groups.values():
            group.close()
        self._groups.clear()
        if self.comm is not None:
            self.comm.Free()
            self.comm = None

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:  # freeing is collective: after an error the other ranks may not come
            self.close()

    def _make(self, ranks: list[int]) -> Communicator:
        if len(ranks) == 1 or self.comm is None:
            return Solo()
        from .mpi import MpiCommunicator

        group = self.comm.group.Incl(ranks)
        made = MpiCommunicator(self.comm.Create_group(group), staged=self.staged)
        group.Free()
        if not self.nccl:
            return made
        from .nccl import NcclCommunicator

        return NcclCommunicator(made)


#: Axes that stand for others in a group: (the parts, what they are a cut of).
_CUTS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("ring", "ulysses"), ("cp",)),
    (("edp", "ep"), DATA),
    (("copy", "shard"), DATA),
    (("ecopy", "eshard", "ep"), DATA),
)
