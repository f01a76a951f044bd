"""Gradients in flat buckets, reduced while the backward still runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .. import kernels
from ..arrays import Array
from ..comm.base import Communicator, Pending
from ..comm.mesh import Mesh
from ..module import Module, Parameter


class Bucket:
    """Some parameters whose ``data`` and ``grad`` are views of two flat arrays, one after the other.

    All of them owe their gradient's sum over the same group, ``comm``, and agree on weight decay. Shards that overlap
    are not the same slab on each rank: their gradients are summed in a buffer of the whole's shape instead.
    """

    def __init__(self, parameters: list[Parameter], comm: Communicator, dtype: DTypeLike, xp: ModuleType) -> None:
        self.parameters, self.comm = parameters, comm
        self.decay, self.overlaps = parameters[0].decay, parameters[0].overlaps
        size = sum(math.prod(p.local_shape) for p in parameters)
        self.data, self.grad = xp.empty(size, dtype), xp.zeros(size, dtype)
        for p, view, grad in zip(parameters, self.views(self.data), self.views(self.grad), strict=True):
            p.data, p.grad = view, grad
        self.missing = 0
        self.pending: list[Pending] | None = None

    def views(self, flat: Array) -> Iterator[Array]:
        """``flat``, an array like ``data``, cut into one array a parameter."""
        start = 0
        for p in self.parameters:
            stop = start + math.prod(p.local_shape)
            yield flat[start:stop].reshape(p.local_shape)
            start = stop

    def start(self) -> None:
        """Begin the sum over the group."""
        if not self.overlaps:
            self.pending = [self.comm.all_reduce(self.grad, out=self.grad)]
            return
        self.pending = []
        for p in self.parameters:
            whole = np.zeros_like(p.grad, shape=p.shape)  # NumPy's dispatch makes it a CuPy array where grad is one
            whole[p.index] = p.grad
            self.pending.append(self.comm.all_reduce(whole, out=whole))

    def finish(self) -> None:
        """Wait for the sum; ``grad`` then holds it."""
        for p, pending in zip(self.parameters, self.pending or (), strict=False):
            whole = pending.wait()
            if self.overlaps:
                p.grad[...] = whole[p.index]
        self.pending = None


class Buckets:
    """Every parameter of this rank in flat buckets, in the order in which the backward completes them.

    A bucket's all-reduce starts as soon as the last of its gradients is complete: ``ready(module)`` counts. Groups that
    reach across pipeline stages (tied weights) wait for ``finish``, since their ranks complete buckets in different
    orders. Parameters of one bucket stand in the order of the backward, of at most ``size`` bytes together (one
    parameter may be larger).

    Li et al., "PyTorch distributed: experiences on accelerating data parallel training", 2020, section 3.2.3.
    """

    def __init__(
        self, module: Module, mesh: Mesh, *, size: float = 4 * 2**20, dtype: DTypeLike = np.float32, xp: ModuleType = np
    ) -> None:
        self.mesh = mesh
        self.parameters = module.parameters()
        self.buckets = [
            Bucket(group, mesh[(*group[0].replicas, *group[0].shared)], dtype, xp)
            for group in _groups(reversed(self.parameters), size / np.dtype(dtype).itemsize)
        ]
        place = {id(p): bucket for bucket in self.buckets for p in bucket.parameters}
        self._held: dict[int, list[Bucket]] = {}
        for _, holder, p in module.walk():
            self._held.setdefault(id(holder), []).append(place[id(p)])
        self.zero()

    def zero(self) -> None:
        """Forget the gradients: the next step's backward adds to zero."""
        for bucket in self.buckets:
            bucket.grad[...] = 0
            bucket.missing = sum(p.uses for p in bucket.parameters)

    def ready(self, module: Any) -> None:
        """The gradients of the parameters that ``module`` holds are complete, as far as this module adds to them."""
        for bucket in self._held.get(id(module), ()):
            bucket.missing -= 1
            if bucket.missing < 0:
                names = ", ".join(p.name for p in bucket.parameters)
                raise RuntimeError(f"{type(module).__name__} called wgrad more than once in a backward ({names})")
            if bucket.missing == 0 and "ends" not in bucket.parameters[0].shared:
                bucket.start()
        for bucket in self.buckets:  # many an MPI makes progress only inside its calls
            for pending in bucket.pending or ():
                pending.test()

    def finish(self) -> None:
        """Start what has not started, and wait for all: every ``grad`` then holds the gradient of the global batch."""
        for bucket in self.buckets:
            if bucket.pending is None:
                bucket.start()
        for bucket in self.buckets:
            bucket.finish()

    def norm(self) -> float:
        """The 2-norm of the whole model's gradient, each element counted once, whatever the layout; every rank gets it.

        norm^2 = sum over tp and pp of sum over owned g^2, in float64. Collective over tp x pp.
        """
        total = 0.0
        for bucket in self.buckets:
            square_sum = kernels.of(bucket.grad).square_sum
            if all(p.owned == p.index for p in bucket.parameters):
                total += square_sum(bucket.grad)
            else:
                total += sum(square_sum(p.grad[p.owned_local]) for p in bucket.parameters)
        whole = self.mesh["pp", "tp_y", "tp"].all_reduce(np.array([total])).wait()
        return math.sqrt(float(whole[0]))


def _summed(p: Parameter) -> int:
    """How many numbers the sum of its gradient moves: the same on every rank of the group, or buckets would differ."""
    return math.prod(p.shape if p.overlaps else p.local_shape)


def _groups(parameters: Iterable[Parameter], most: float) -> list[list[Parameter]]:
    """Runs of parameters that can share a bucket: one open bucket for each kind, closed when it is full."""
    closed: list[list[Parameter]] = []
    opened: dict[tuple[Any, ...], list[Parameter]] = {}
    for p in parameters:
        kind = (p.replicas, p.shared, p.overlaps, p.decay)
        group = opened.setdefault(kind, [])
        if group and sum(map(_summed, (*group, p))) > most:
            closed.append(group)
            group = opened[kind] = []
        group.append(p)
    return closed + list(opened.values())
