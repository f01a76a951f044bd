"""Mesh: a named Cartesian grid of ranks, with a communicator for any set of its axes."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .base import Communicator, Solo

if TYPE_CHECKING:
    from mpi4py import MPI


class Mesh:
    """``Mesh(comm, dp=2, pp=2, tp=4)``: ranks in C order of the axes, the last varying fastest (it stays on a node).

    ``mesh["tp"]`` is the communicator along one axis, ``mesh["dp", "tp"]`` along several: its ranks are those that
    share this rank's coordinates on all other axes. The axis ``"ends"`` is made of the first and the last rank of
    ``pp`` (where tied weights live); a rank between them has no such group. An axis that is not named has size 1, and a
    group of one needs no MPI: ``Mesh()`` is the serial mesh.

    The caller's communicator is duplicated, never used itself; ``close`` frees all that the mesh made. A group is made
    when first asked for, which is collective over that group alone.

    backend: "mpi", "nccl", or "auto" (NCCL for arrays on a GPU, MPI for arrays on the host). staged: whether MPI gets
    host copies of device arrays instead of device pointers.
    """

    axes = ("dp", "pp", "tp")

    def __init__(
        self,
        comm: MPI.Intracomm | None = None,
        *,
        dp: int = 1,
        pp: int = 1,
        tp: int = 1,
        device: str = "cpu",
        backend: str = "auto",
        staged: bool = False,
    ) -> None:
        self.shape = {"dp": dp, "pp": pp, "tp": tp}
        self.size = math.prod(self.shape.values())
        have = 1 if comm is None else comm.size
        if self.size != have:
            product = " x ".join(f"{axis}={n}" for axis, n in self.shape.items())
            raise InputError(f"layout: {product} needs {self.size} ranks, and there are {have}")
        self.device, self.staged = device, staged
        self.nccl = backend == "nccl" or (backend == "auto" and device == "cuda")
        self.comm = None if comm is None else comm.Dup()
        self.rank = 0 if comm is None else comm.rank
        self._groups: dict[frozenset[str], Communicator] = {}

    @property
    def coordinates(self) -> dict[str, int]:
        """This rank's place on every axis."""
        return self._coordinates(self.rank)

    def __getitem__(self, axes: str | tuple[str, ...]) -> Communicator:
        names = frozenset((axes,) if isinstance(axes, str) else axes)
        if names not in self._groups:
            self._groups[names] = self._make(self.members(names))
        return self._groups[names]

    def members(self, axes: frozenset[str]) -> list[int]:
        """The ranks of this rank's group along ``axes``, in order."""
        here, last = self.coordinates, self.shape["pp"] - 1
        if unknown := axes - set(self.axes) - {"ends"}:
            raise ValueError(f"mesh: no axis {sorted(unknown)}; there are {self.axes} and 'ends'")
        if "ends" in axes and here["pp"] not in (0, last):
            raise ValueError("mesh: a rank between the ends of the pipeline is in no group along 'ends'")
        choices = []
        for axis, n in self.shape.items():
            if axis in axes:
                choices.append(list(range(n)))
            elif axis == "pp" and "ends" in axes:
                choices.append(sorted({0, last}))
            else:
                choices.append([here[axis]])
        return [self._rank(place) for place in itertools.product(*choices)]

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

    def _coordinates(self, rank: int) -> dict[str, int]:
        place = {}
        for axis, n in reversed(self.shape.items()):
            rank, place[axis] = divmod(rank, n)
        return {axis: place[axis] for axis in self.shape}

    def _rank(self, place: tuple[int, ...]) -> int:
        rank = 0
        for i, n in zip(place, self.shape.values(), strict=True):
            rank = rank * n + i
        return rank
