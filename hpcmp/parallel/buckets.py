"""Buckets: the weights and gradients of a rank, summed while the backward still runs, and sharded by ZeRO."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .. import kernels
from ..arrays import Array, to_host, wide
from ..comm.mesh import Mesh
from ..module import Module, Parameter
from .bucket import Bucket as Bucket
from .pieces import Piece as Piece
from .zero import gather_units

#: How many buckets' gradients are scattered at once: without ZeRO there is nothing to scatter, and what is scattered is
#: held besides what is filled from stage 2 on (in stage 1 a shard of it).
_FLYING = {0: 0, 1: 8, 2: 2, 3: 2}


class Buckets:
    """Every parameter of this rank's ``stages`` in flat buckets, in the order in which the backward completes them.

    zero = 1 shards master weights and optimizer states over the ranks of ``mesh["shard"]`` (experts: "eshard"), 2 the
    gradients too, 3 the weights too; copies of the shards lie along "copy" ("ecopy"). Rajbhandari et al., "ZeRO", 2020,
    section 5. docs/zero.md says what each holds and sends.

    A ``wgrad.Sink``: a bucket's sum starts as soon as the last of its gradients is complete, with zero > 1 for each
    microbatch. Groups that reach across pipeline stages (tied weights) wait for ``finish``, since their ranks complete
    buckets in different orders. All else is started in the order of the backward, the same on every rank of a group.

    Parameters of one bucket stand in the order of the backward, of at most ``size`` bytes of gradients together (one
    parameter may be larger), all of one stage; with zero = 3, of one child of a stage, which must be a ``Sequential``:
    its children become ``Gathered``. dtype: of the weights that layers use; master: of gradients and master weights, by
    default ``arrays.wide(dtype)``.

    Li et al., "PyTorch distributed: experiences on accelerating data parallel training", 2020, section 3.2.3.
    """

    def __init__(
        self,
        stages: Module | Sequence[Module],
        mesh: Mesh,
        *,
        zero: int = 0,
        size: float = 4 * 2**20,
        dtype: DTypeLike = np.float32,
        master: DTypeLike | None = None,
        xp: ModuleType = np,
    ) -> None:
        stages = [stages] if isinstance(stages, Module) else list(stages)
        master = np.dtype(wide(dtype) if master is None else master)
        self.mesh, self.zero_stage = mesh, zero
        self.parameters = _count_uses(stages)
        units = stages
        if zero == 3:
            units = [child for stage in stages for _, child in stage.members() if isinstance(child, Module)]
        self.buckets: list[Bucket] = []
        place: dict[int, Bucket] = {}
        for unit in reversed(units):
            new = {id(p): p for _, _, p in unit.walk() if id(p) not in place}
            for group in _groups(reversed(new.values()), size / master.itemsize, alone=zero > 1):
                bucket = Bucket(group, mesh, zero=zero, dtype=dtype, master=master, xp=xp)
                self.buckets.append(bucket)
                place |= {id(p): bucket for p in group}
        self._held: dict[int, list[Bucket]] = {}
        for stage in stages:
            for _, holder, p in stage.walk():
                self._held.setdefault(id(holder), []).append(place[id(p)])
        self._flying: deque[Bucket] = deque()  # scattered, and not collected yet
        self._moving: dict[Bucket, None] = {}  # sent in this step, in order
        #: Called, if it is set, with a bucket whose ``full`` holds this rank's own part, which is about to be summed.
        self.before_sum: Callable[[Bucket], None] | None = None
        if zero == 3:
            gather_units(stages, place)
        self.zero()

    def initialise(self, seed: int) -> None:
        """Give every parameter its initial value: drawn one parameter at a time, of which this rank keeps its shard.
        Collective."""
        for bucket in self.buckets:
            for piece in bucket.pieces():
                values = piece.parameter.initial(piece.parameter, seed, bucket.xp)
                bucket.master[piece.place] = values.reshape(-1)[piece.start : piece.stop]
        self.publish()

    def zero(self) -> None:
        """Forget the gradients: the next step's backward adds to zero."""
        for bucket in self.buckets:
            bucket.forget()

    def begin(self, module: Any) -> None:
        """Have arrays there for the gradients of what ``module`` holds."""
        for bucket in self._held.get(id(module), ()):
            bucket.fill()

    def done(self, module: Any, final: bool) -> None:
        """``module`` has added to the gradients of what it holds; ``final``: for the last time in this step."""
        for bucket in self._held.get(id(module), ()):
            bucket.filling -= 1
            bucket.missing -= final
            if bucket.missing < 0:
                names = ", ".join(p.name for p in bucket.parameters)
                raise RuntimeError(f"{type(module).__name__} called wgrad more than once in a backward ({names})")
            if (final and bucket.missing == 0) if self.zero_stage < 2 else bucket.filling == 0:
                self._send(bucket)
        for bucket in self._moving:  # many an MPI makes progress only inside its calls
            bucket.progress()

    def finish(self) -> None:
        """Start what has not started, and wait for all: every ``grad`` then holds the gradient of the global batch."""
        while self._flying:
            self._receive(self._flying.popleft())
        for bucket in self.buckets:
            if bucket.pending is None:
                if bucket.missing:
                    self._scatter(bucket)
                    bucket.collect()
                bucket.start()
        for bucket in self.buckets:
            bucket.finish()
        self._moving.clear()

    def publish(self) -> None:
        """Make the weights that layers use those of the masters, after these have changed. Collective."""
        for before, bucket in zip([None, *self.buckets], self.buckets, strict=False):
            bucket.publish()  # under which the one before comes in
            if before is not None:
                before.arrive()
        if self.buckets:
            self.buckets[-1].arrive()

    def norm(self) -> float:
        """The 2-norm of the whole model's gradient, each element counted once, whatever the layout; every rank gets it.

        norm^2 = sum over ranks of what ``add_squares`` adds, in float64. The host waits. Collective over the mesh.
        """
        xp = self.buckets[0].xp if self.buckets else np
        total = xp.zeros(1)
        self.add_squares(total)
        return math.sqrt(float(self.mesh[Mesh.axes].all_reduce(to_host(total)).wait()[0]))

    def add_squares(self, total: Array) -> None:
        """Add to ``total`` (1,), float64, where the gradients are, the sum over owned g^2 of the shard; of copies of a
        shard the first counts. Nothing waits for it."""
        for bucket in self.buckets:
            if bucket.replicas.rank:
                continue
            add_square_sum = kernels.of(bucket.grad).add_square_sum
            if all(p.owned == p.index for p in bucket.parameters):
                add_square_sum(total, bucket.grad)
            else:
                pieces = (piece.cut(bucket.grad[piece.place], piece.parameter.owned) for piece in bucket.pieces())
                for _, part in (pair for parts in pieces for pair in parts):
                    add_square_sum(total, part)

    def bytes(self) -> dict[str, int]:
        """What this rank holds in ``parameters`` (weights that layers use), ``gradients`` and ``master`` weights that
        are no view of those."""
        held = {"parameters": 0, "gradients": 0, "master": 0}
        for b in self.buckets:
            held["parameters"] += 0 if b.data is None else b.data.nbytes
            held["gradients"] += (b.grad.nbytes if b.zero > 1 else 0) + (0 if b.full is None else b.full.nbytes)
            held["master"] += 0 if b.view else b.master.nbytes
        return held

    def _send(self, bucket: Bucket) -> None:
        """Begin the sum of a bucket, and end those of buckets long under way, in the same order on every rank."""
        self._scatter(bucket)
        self._flying.append(bucket)
        self._moving[bucket] = None
        while len(self._flying) > _FLYING[self.zero_stage]:
            self._receive(self._flying.popleft())

    def _scatter(self, bucket: Bucket) -> None:
        if self.before_sum is not None:
            self.before_sum(bucket)
        bucket.scatter()

    def _receive(self, bucket: Bucket) -> None:
        bucket.collect()
        if bucket.missing == 0 and bucket not in self._flying and "ends" not in bucket.shared:
            bucket.start()


def _count_uses(stages: Sequence[Module]) -> list[Parameter]:
    """Every parameter of the stages once, in the order of first use; ``uses`` counts those of all stages."""
    uses: dict[int, int] = {}
    found: dict[int, Parameter] = {}
    for stage in stages:
        for p in stage.parameters():
            found[id(p)] = p
            uses[id(p)] = uses.get(id(p), 0) + p.uses
    for p in found.values():
        p.uses = uses[id(p)]
    return list(found.values())


def _summed(p: Parameter) -> int:
    """How many numbers the sum of its gradient moves: the same on every rank of the group, or buckets would differ."""
    return math.prod(p.shape if p.overlaps else p.local_shape)


def _groups(parameters: Iterable[Parameter], most: float, alone: bool) -> list[list[Parameter]]:
    """Runs of parameters that can share a bucket: one open bucket for each kind, closed when it is full.

    alone: whether a parameter that several modules use has one of its own, to be summed after each.
    """
    closed: list[list[Parameter]] = []
    opened: dict[tuple[Any, ...], list[Parameter]] = {}
    for p in parameters:
        kind = (p.replicas, p.shared, p.overlaps, p.decay, p.matrix is None, p.name if alone and p.uses > 1 else "")
        group = opened.setdefault(kind, [])
        if group and sum(map(_summed, (*group, p))) > most:
            closed.append(group)
            group = opened[kind] = []
        group.append(p)
    return closed + list(opened.values())
