"""Outcome: what comes of a step, the same on every rank. It is summed, and decides about the weights, where the
gradient is; the host reads it later, and a GPU goes on meanwhile."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..arrays import Array, to_host
from ..comm.mesh import Mesh
from ..layers.moe.router import LOSSES
from . import nonfinite

if TYPE_CHECKING:
    from .engine import Engine

#: A replica's share of a step's inputs and targets, and each sample's index within the global batch.
Batch = tuple[Array, Array, Array]

#: What a step sums over all ranks, in one vector: first what ``kernels.update.clip_factor`` reads.
SUMS = ("squares", "loss", "stop", "tell", *LOSSES)


@dataclass(frozen=True)
class Result:
    """What a step did, the same on every rank: the mean loss in nats a token, the gradient's norm before clipping, the
    learning rate, whether any rank asked to stop, and whether the step was skipped since float16 overflowed; whether
    any rank asked for a word of all; and if the loss or norm is not finite for another reason, which and where: nothing
    was changed then.

    Of the routers of experts, means over their layers, no part of ``loss``: their losses ``balance`` and ``z``, before
    their weights, and ``dropped``, the share of the choices that were beyond the capacity; zero without experts."""

    loss: float
    norm: float
    rate: float
    stop: bool
    skipped: bool = False
    balance: float = 0.0
    z: float = 0.0
    dropped: float = 0.0
    tell: bool = False
    trouble: str = ""

    @property
    def sound(self) -> bool:
        """Whether the step changed the weights."""
        return not (self.skipped or self.trouble)


class Running:
    """A step of ``engine`` that has been queued. It may still be running; ``result`` waits for it.

    A step whose loss or gradient is not finite changes nothing, and neither does what is begun after it, until its
    result has been asked for: those steps are to be begun again. Results are asked for in the order of the steps.
    """

    def __init__(self, engine: Engine, number: int, batch: Batch, rate: float, loss: Array, sums: Array) -> None:
        self.engine, self.number, self.batch, self.rate = engine, number, batch, rate
        self.loss = loss  # this rank's part of the sum
        self.scale = engine.loss_scale.begun()
        self.before = engine.optimizer.steps - 1  # this step is counted
        self._read = engine.host.copies.read(sums)
        self._result: Result | None = None

    def result(self) -> Result:
        """Wait for the step, and what was queued before it. Collective over the mesh where the step is no good."""
        if self._result is None:
            with self.engine.phases("compute"):
                read = self._read()
            self._result = self._judge(dict(zip(SUMS, map(float, read), strict=True)))
            self.engine.phases.steps += 1
        return self._result

    def _judge(self, sums: dict[str, float]) -> Result:
        engine, loss, norm = self.engine, sums["loss"], math.sqrt(sums["squares"]) / self.scale.scale
        finite = math.isfinite(loss) and math.isfinite(norm)
        skipped, trouble = False, ""
        if not finite:  # this step has been counted, and perhaps others that came to nothing
            engine.optimizer.steps = self.before
            engine.factor[...] = 1.0
            skipped = engine.loss_scale.overflowed(self.scale)
        if not (finite or skipped):
            again = partial(engine.gradient, self.number, *self.batch)
            where = nonfinite.find(engine, _number(self.loss), lambda: _number(again()))
            trouble = f"loss {loss}, gradient norm {norm}; {where}"
        mean = engine.weight(self.batch[0]) / max(1, engine.architecture.expert_layers)
        return Result(
            loss,
            norm,
            self.rate,
            sums["stop"] > 0,
            skipped,
            sums["balance"] * mean,
            sums["z"] * mean,
            sums["dropped"] / max(1, sums["choices"]),
            sums["tell"] > 0,
            trouble,
        )


def summed(engine: Engine, loss: Array, asked: Iterable[str]) -> Array:
    """``SUMS``, over all ranks, of a step whose gradient is in the buckets: (len(SUMS),), float64, where that is.
    Collective over the mesh; nothing waits for it but MPI.

    loss: this rank's part of it. asked: which of "stop" and "tell" this rank asks for.
    """
    sums = engine.xp.zeros(len(SUMS))
    engine.buckets.add_squares(sums[:1])
    found = {"loss": loss, **dict.fromkeys(asked, 1.0), **engine.cursor.losses}
    for i, name in enumerate(SUMS):
        if name in found:
            sums[i] = found[name]
    return engine.mesh[Mesh.axes].all_reduce(sums, out=sums).wait()


def _number(x: Array) -> float:
    return float(to_host(x))
