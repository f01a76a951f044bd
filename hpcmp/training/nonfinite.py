"""A step with a loss or gradient that is no number: where it comes from, and whether the run may go on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from ..arrays import Array, array_module
from ..comm.check import ranks_text
from ..errors import HpcmpError
from ..parallel.bucket import Bucket

if TYPE_CHECKING:
    from .engine import Engine, Result


class Found(NamedTuple):
    """What is not finite on one rank: names of weights; its own part of the loss as it was, and computed again; names
    of gradients of its own, in the order of the backward; and where in the model that order begins: the rank's place in
    the pipeline, and the number of the parameter in the order of the forward."""

    weights: list[str]
    loss: float
    again: float
    gradients: list[str]
    depth: tuple[int, int] = (0, 0)


def find(engine: Engine, loss: float, gradient: Callable[[], float]) -> str:
    """Say on which rank, and in what, a number that is not finite first appears. Collective over the mesh.

    loss: this rank's part of it. gradient: computes the step's gradient again, and returns this rank's part of the
    loss; what each rank contributes is looked at before it is summed. Nothing of this costs a step that is sound. A
    fault that does not come again was not of the model or the data.
    """
    buckets = engine.buckets
    weights = [
        piece.parameter.name
        for bucket in buckets.buckets
        for piece in bucket.pieces()
        if not _finite(bucket.master[piece.place])
    ]
    bad: set[str] = set()

    def look(bucket: Bucket) -> None:
        if bucket.full is not None:
            views = zip(bucket.parameters, bucket.views(bucket.full), strict=True)
            bad.update(p.name for p, view in views if not _finite(view))

    buckets.before_sum = look
    try:
        again = gradient()
    finally:
        buckets.before_sum = None
    names = [p.name for p in buckets.parameters]
    gradients = sorted(bad, key=names.index, reverse=True)
    depth = engine.mesh["pp"].rank, names.index(gradients[0]) if gradients else 0
    return describe(engine.mesh.gather_objects(Found(weights, loss, again, gradients, depth)))


def describe(ranks: list[Found]) -> str:
    """The same in words, of what each rank found."""
    unsound = [rank for rank, found in enumerate(ranks) if found.weights]
    if unsound:
        return f"{_some(ranks[unsound[0]].weights)} not finite already on {ranks_text(unsound)}"
    losses = [rank for rank, found in enumerate(ranks) if not math.isfinite(found.again)]
    told = [f"the loss is not finite on {ranks_text(losses)}"] if losses else []
    bad = {rank: found.depth for rank, found in enumerate(ranks) if found.gradients}
    if bad:
        first = [rank for rank, depth in bad.items() if depth == max(bad.values())]
        rest = [rank for rank in bad if rank not in first]
        after = f", and then on {ranks_text(rest)}" if rest else ""
        told.append(f"on {ranks_text(first)} the gradient of {_some(ranks[first[0]].gradients)}{after}")
    if told:
        return "; ".join(told)
    then = [rank for rank, found in enumerate(ranks) if not math.isfinite(found.loss)]
    where = f" (the loss was not on {ranks_text(then)})" if then else ""
    return f"computed again, all is finite{where}: a passing fault, of memory or a device"


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _finite(x: Array) -> bool:
    return bool(array_module(x).isfinite(x).all())


class Patience:
    """How many steps in a row may be skipped since they are not finite: ``train.nan`` and ``train.nan_limit``."""

    def __init__(self, policy: str, limit: int) -> None:
        self.limit = limit if policy == "skip" else 0
        self.bad = 0

    def after(self, step: int, result: Result) -> HpcmpError | None:
        """Take note of step number ``step``; the error that ends the run if it must not go on."""
        if not result.trouble:
            self.bad = self.bad if result.skipped else 0
            return None
        self.bad += 1
        if self.bad <= self.limit:
            return None
        many = f"; train.nan_limit = {self.limit} steps in a row were skipped" if self.limit else ""
        return HpcmpError(f"step {step}: {result.trouble}{many}")
