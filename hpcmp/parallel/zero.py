"""ZeRO stage 3: weights that are there only while a unit of the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..module import Module, Parameter
from ..wgrad import WGrad
from .bucket import Bucket


class Window:
    """The buckets whose weights this rank has gathered: those of the unit that runs, and of the one that runs next."""

    def __init__(self) -> None:
        self.held: list[Bucket] = []

    def move(self, here: Sequence[Bucket], coming: Sequence[Bucket]) -> None:
        """Have the weights of ``here``, those of ``coming`` on their way, and no others."""
        wanted = [*here, *(bucket for bucket in coming if bucket not in here)]
        for bucket in self.held:
            if bucket not in wanted:
                bucket.drop()
        for bucket in wanted:
            bucket.fetch()
        for bucket in here:
            bucket.arrive()
        self.held = wanted


class Gathered(Module):
    """f with its weights gathered while it runs, forward and backward, and its successor's under it.

    The weights stay until another unit needs its own: at the turn from forward to backward nothing is gathered again.
    Rajbhandari et al., "ZeRO", 2020, section 5.3; the prefetch is that of Zhao et al., "PyTorch FSDP", 2023,
    section 3.3.2.
    """

    def __init__(self, inner: Module, window: Window, buckets: list[Bucket]) -> None:
        self.inner, self.window, self.buckets = inner, window, buckets
        self.before: list[Bucket] = []
        self.after: list[Bucket] = []

    def members(self) -> Iterator[tuple[str, Parameter | Module]]:
        yield "", self.inner  # gathering changes no parameter's name

    def forward(self, x: Any) -> tuple[Any, Any]:
        self.window.move(self.buckets, self.after)
        return self.inner.forward(x)

    def backward(self, dy: Any, saved: Any, wgrad: WGrad) -> Any:
        self.window.move(self.buckets, self.before)
        return self.inner.backward(dy, saved, wgrad)


def gather_units(stages: Sequence[Any], place: Mapping[int, Bucket]) -> None:
    """Replace every child that has parameters of every stage (a ``Sequential``) by the same, ``Gathered``.

    place: the bucket of each parameter, by its id.
    """
    window = Window()
    for stage in stages:
        units: list[Gathered] = []
        for name, layer in stage.layers.items():
            buckets = list({id(b): b for b in (place[id(p)] for _, _, p in layer.walk())}.values())
            if buckets:
                unit = stage.layers[name] = Gathered(layer, window, buckets)
                if units:
                    unit.before, units[-1].after = units[-1].buckets, buckets
                units.append(unit)
