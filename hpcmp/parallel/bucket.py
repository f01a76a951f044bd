"""Bucket: some parameters in flat arrays, of which this rank may hold a shard (ZeRO)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import numpy as np
from numpy.typing import DTypeLike

from .. import kernels, partition
from ..arrays import Array
from ..comm.base import Communicator, Pending, Solo
from ..comm.mesh import Mesh
from ..module import Parameter
from .pieces import Piece


class Bucket:
    """Parameters one after the other in flat arrays. All of them are replicated over the same axes, owe their
    gradient's sum over the same further ones, in the same way, and agree on weight decay.

    data: the weights that the layers use, in their dtype; None while this rank holds only a shard of them. shard: this
    rank's part of the flat range, everything without ZeRO. master: the shard of the weights that the optimizer moves,
    in ``master`` dtype; a view of ``data`` where both can be one. grad: the shard of the gradient, likewise, and after
    ``finish`` summed over all ranks that owe a part of it. full: the flat gradient that the layers add to.

    =====  ========================================  =======================================
    zero   held as a shard                           held whole
    =====  ========================================  =======================================
    0                                                data, full
    1      master (if not data's view)               data, full
    2      master, grad                              data; full while it is being filled
    3      master, grad                              data while gathered; full while filled
    =====  ========================================  =======================================

    A sum is two: ``scatter`` and ``collect`` over ``sharding``, the ranks that share what is sharded (a group of one
    without ZeRO), ``start`` and ``finish`` over ``copies``, which hold the same shard, or a part of the same gradient.
    Shards that overlap are not the same slab on each rank: theirs is in a buffer of the whole's shape instead.
    """

    def __init__(
        self,
        parameters: list[Parameter],
        mesh: Mesh,
        *,
        zero: int = 0,
        dtype: DTypeLike,
        master: DTypeLike,
        xp: ModuleType = np,
    ) -> None:
        self.parameters, self.zero, self.xp, self.dtype = parameters, zero, xp, np.dtype(dtype)
        first = parameters[0]
        self.decay, self.overlaps, self.shared = first.decay, first.overlaps, first.shared
        e = "e" if first.replicas == ("edp",) else ""
        held = (f"{e}copy",) if zero else first.replicas
        self.sharding: Communicator = mesh[f"{e}shard"] if zero else Solo()
        self.replicas = mesh[held]  # the ranks that hold this very shard
        self.copies = mesh[(*(first.replicas if self.overlaps else held), *self.shared)]

        self.size = sum(math.prod(p.local_shape) for p in parameters)
        self.rows = partition.sizes(self.size, self.sharding.size)
        self.shard = self.sharding.part(self.size)
        mine = self.shard.stop - self.shard.start
        self.data: Array = None if zero == 3 else xp.empty(self.size, dtype)
        self.view = zero < 3 and np.dtype(master) == self.dtype  # whether ``master`` is one of ``data``
        self.master: Array = self.part(self.data) if self.view else xp.empty(mine, master)
        self.full: Array = None if zero > 1 else xp.zeros(self.size, master)
        self.grad: Array = xp.zeros(mine, master) if zero > 1 else self.part(self.full)
        self._bind("data", self.data)
        self._bind("grad", self.full)

        self.missing = 0  # final uses that have not added their gradient in this step
        self.filling = 0  # parameters whose gradient ``full`` still waits for, with zero > 1
        self._scattering: list[Pending] = []
        self._gathering: Pending | None = None
        self._rounded = False  # whether ``data`` has the new masters already
        self.pending: list[Pending] | None = None

    def part(self, flat: Array) -> Array:
        """This rank's shard of ``flat``, an array like ``data``."""
        return flat[self.shard]

    def views(self, flat: Array) -> Iterator[Array]:
        """``flat``, an array like ``data``, cut into one array a parameter."""
        start = 0
        for p in self.parameters:
            stop = start + math.prod(p.local_shape)
            yield flat[start:stop].reshape(p.local_shape)
            start = stop

    def pieces(self) -> Iterator[Piece]:
        """The part of each parameter that lies in the shard; it may be empty."""
        start = 0
        for p in self.parameters:
            stop = start + math.prod(p.local_shape)
            a, b = (min(max(at, self.shard.start), self.shard.stop) for at in (start, stop))
            yield Piece(p, a - start, b - start, slice(a - self.shard.start, b - self.shard.start))
            start = stop

    def forget(self) -> None:
        """Set the gradient to zero, for the next step."""
        (self.grad if self.zero > 1 else self.full)[...] = 0
        self.missing = sum(p.uses for p in self.parameters)

    def fill(self) -> None:
        """Have ``full`` there for a gradient to be added to."""
        if self.full is None:
            self.full = self.xp.zeros(self.size, self.grad.dtype)
            self._bind("grad", self.full)
            self.filling = len(self.parameters)

    def scatter(self) -> None:
        """Begin to sum ``full`` over the ranks that share it, each getting its shard; let go of it with zero > 1."""
        if self.full is None:
            return
        self._scattering.append(self.sharding.reduce_scatter_v(self.full, self.rows))
        if self.zero > 1:
            self.full = None
            self._bind("grad", None)

    def collect(self) -> None:
        """Wait for the oldest ``scatter``; ``grad`` then holds its sum, with zero > 1 besides what it held."""
        if not self._scattering:
            return
        summed = self._scattering.pop(0).wait()
        if self.zero > 1:
            self.grad += summed
        elif summed is not self.full:
            self.grad[...] = summed

    def start(self) -> None:
        """Begin the sum of ``grad`` over the copies."""
        if not self.overlaps:
            self.pending = [self.copies.all_reduce(self.grad, out=self.grad)]
            return
        self.pending = []
        for piece in self.pieces():
            p = piece.parameter
            local = np.zeros_like(self.grad, shape=math.prod(p.local_shape))  # NumPy's dispatch: CuPy's where grad is
            local[piece.start : piece.stop] = self.grad[piece.place]
            whole = np.zeros_like(self.grad, shape=p.shape)
            whole[p.index] = local.reshape(p.local_shape)
            self.pending.append(self.copies.all_reduce(whole, out=whole))

    def finish(self) -> None:
        """Wait for it; ``grad`` then holds the shard of the gradient of the global batch."""
        for piece, pending in zip(self.pieces(), self.pending or (), strict=False):
            whole = pending.wait()
            if self.overlaps:
                self.grad[piece.place] = whole[piece.parameter.index].reshape(-1)[piece.start : piece.stop]
        self.pending = None

    def progress(self) -> None:
        """Give the library a chance to move what is on its way."""
        for pending in (*self._scattering, *(self.pending or ())):
            pending.test()

    def rounding(self) -> Array | None:
        """This rank's part of ``data``, for an optimizer that writes the new masters there as it makes them, which
        ``publish`` then leaves out; None where there is nothing to write."""
        if self.view or self.zero == 3:
            return None
        self._rounded = True
        return self.part(self.data)

    def publish(self) -> None:
        """Begin to make ``data`` of the masters of all ranks; ``arrive`` waits. With zero = 3 the old data go."""
        if self.zero == 3:
            self.drop()
            return
        for p in self.parameters:
            p.version += 1
        here = self.part(self.data)
        if not (self.view or self._rounded):
            kernels.of(self.master).assign(here, self.master)
        self._rounded = False
        if self.zero:
            self._gathering = self.sharding.all_gather_v(here, self.rows)

    def fetch(self) -> None:
        """Begin to gather ``data``, if it is not there or on its way; ``arrive`` waits."""
        if self.data is None and self._gathering is None:
            shard = self.master.astype(self.dtype, copy=False)
            self._gathering = self.sharding.all_gather_v(shard, self.rows)

    def arrive(self) -> None:
        """Wait for ``publish`` or ``fetch``: the parameters' ``data`` are then there."""
        if self._gathering is None:
            return
        whole, self._gathering = self._gathering.wait(), None
        if self.data is None:
            self.data = whole
            self._bind("data", whole)
        elif whole is not self.data:
            self.data[...] = whole

    def drop(self) -> None:
        """Let go of gathered weights."""
        self.arrive()
        self.data = None
        self._bind("data", None)

    def _bind(self, kind: str, flat: Array) -> None:
        views = [None] * len(self.parameters) if flat is None else self.views(flat)
        for p, view in zip(self.parameters, views, strict=True):
            setattr(p, kind, view)
            if kind == "data":
                p.derived = None
