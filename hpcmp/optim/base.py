"""What every optimizer shares: clipping by the global norm, state beside the buckets' shards, new weights published."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from ..arrays import Array
from ..offload import Handle, Host
from ..parallel.bucket import Bucket
from ..parallel.buckets import Buckets
from ..parallel.pieces import Piece


class Optimizer(ABC):
    """w <- w - rate * direction(g), g the gradient of the global batch, clipped; the same on every layout.

    Works on the flat shards of the buckets: their ``master`` weights and summed ``grad``, and for each of ``kinds`` an
    array of state alike (moments), zero at first. Each rank holds and steps its own shard alone: all of its parameters,
    or with ZeRO a part. Copies of a parameter on several ranks take the same step.

    weight_decay: decoupled (Loshchilov and Hutter, 2019), on parameters whose ``decay`` is true. clip: the largest norm
    of the whole gradient (Pascanu et al., 2013); None for no limit. host: where the state waits between steps; None for
    where the shards are.
    """

    kinds: tuple[str, ...]

    def __init__(
        self, buckets: Buckets, *, weight_decay: float = 0.1, clip: float | None = 1.0, host: Host | None = None
    ) -> None:
        self.buckets, self.weight_decay, self.clip = buckets, weight_decay, clip
        self.steps = 0
        put = (host or Host()).put
        self.states: list[dict[str, Handle]] = []
        for bucket in buckets.buckets:  # NumPy's dispatch makes these CuPy arrays where the shards are
            self.states.append({kind: put(np.zeros_like(bucket.grad)) for kind in self.kinds_of(bucket)})
            _settle(self.states[-1])

    def step(self, rate: float, *, scale: float = 1.0) -> float:
        """One step with the gradients as they are in the buckets, divided by ``scale`` (the loss scale); returns their
        global norm before clipping.

        With norm > clip the gradient is multiplied by clip/norm. A norm that is not finite changes nothing but is
        returned, the same on every rank: the caller decides. Collective over the mesh. The host waits for the norm:
        ``Engine`` calls ``apply`` in place of this.
        """
        norm = self.buckets.norm() / scale
        if math.isfinite(norm):
            clipped = 1.0 if self.clip is None or norm <= self.clip else self.clip / norm
            self.apply(rate, clipped / scale)
        return norm

    def apply(self, rate: float, factor: float | Array) -> None:
        """One step with ``factor`` times the gradients in the buckets; none at all if that is NaN. Collective.

        factor: the same on every rank; a number, or an array of one, float64, where the gradients are, which the host
        does not wait for. ``steps`` counts the step in any case: who learns that the factor was NaN takes that back.
        """
        self.steps += 1
        self.update(rate, factor)
        self.buckets.publish()

    @abstractmethod
    def update(self, rate: float, grad_scale: float | Array) -> None:
        """Move every bucket's ``master`` and state, unless grad_scale is NaN; ``steps`` counts this step already.
        grad_scale: as ``kernels.update`` takes it. The host must not ask for it, nor for what depends on it."""

    def resident(self) -> Iterator[tuple[Bucket, dict[str, Array]]]:
        """Every bucket, and its state to be changed in place: what waits on the host comes in while the bucket before
        is at work, and leaves under the one after."""
        leaving: dict[str, Handle] = {}
        coming = [*self.states, {}][1:]  # none for a rank without parameters
        for bucket, state, following in zip(self.buckets.buckets, self.states, coming, strict=True):
            arrays = {kind: handle.fetch() for kind, handle in state.items()}
            for handle in following.values():
                handle.fetch()
            here = {kind: pending.wait() for kind, pending in arrays.items()}
            yield bucket, here
            for kind, handle in state.items():
                handle.store(here[kind])
            _settle(leaving)
            leaving = state
        _settle(leaving)

    def kinds_of(self, bucket: Bucket) -> tuple[str, ...]:
        """Which of ``kinds`` a bucket needs."""
        return self.kinds

    def decay(self, bucket: Bucket) -> float:
        """The weight decay of a bucket."""
        return self.weight_decay if bucket.decay else 0.0

    def state(self) -> Iterator[tuple[str, Piece, Array]]:
        """(kind, piece, flat array of the piece) for each state of each parameter: what a checkpoint holds besides
        the weights and ``steps``."""
        for bucket, states in zip(self.buckets.buckets, self.states, strict=True):
            for kind, handle in states.items():
                flat = handle.host()
                for piece in bucket.pieces():
                    yield kind, piece, flat[piece.place]


def _settle(state: dict[str, Handle]) -> None:
    for handle in state.values():
        handle.settle()
