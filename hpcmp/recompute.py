"""Selective recomputation: what of a transformer block is made again in the backward instead of being kept.

full         the whole block (``module.Recompute``): its input alone is kept
attention    the core attention, when the backward of the output projection needs its result
activations  the norms and the activation, when the backward of the linear after each needs its result

The last two make again only what is cheap to make beside the linears: Korthikanti et al., "Reducing activation
recomputation in large transformer models", 2022, section 5. docs/memory.md has the formulas and what was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .arrays import Array
from .module import Module, Parameter, Recompute, Sequential
from .wgrad import WGrad

#: By kind, the (first, last) layers of each unit in which the input of the last is made again by those before it.
UNITS: dict[str, tuple[tuple[str, str], ...]] = {
    "attention": (("core", "out"),),
    "activations": (("norm", "qkv"), ("norm", "up"), ("activation", "down")),
}


class RecomputeInput(Module):
    """g o f, which keeps the input of f in place of the input of g: f runs forward again in the backward.

    ``layers`` are those of f, then g, named as in a Sequential; g is a layer that then keeps its input and nothing
    else, as a linear does (TypeError otherwise). So g's own forward, and what it communicates, is not repeated.
    """

    def __init__(self, **layers: Module) -> None:
        *first, self.name = layers
        self.f, self.g = Sequential(**{name: layers[name] for name in first}), layers[self.name]
        self.g.input_stays = True

    def members(self) -> Iterator[tuple[str, Parameter | Module]]:
        yield from self.f.members()
        yield self.name, self.g

    def forward(self, x: Any) -> tuple[Any, Any]:
        z = self.f.forward(x)[0]
        return self._alone(z, *self.g.forward(z)), x

    def forward_onto(self, x: Any, onto: Array) -> tuple[Array, Any]:
        z = self.f.forward(x)[0]
        return self._alone(z, *self.g.forward_onto(z, onto)), x

    def _alone(self, z: Any, y: Any, saved: Any) -> Any:
        if saved is not z:
            raise TypeError(f"{type(self.g).__name__} keeps more than its input, which cannot be made again for it")
        return y

    def backward(self, dy: Any, saved: Any, wgrad: WGrad) -> Any:
        z, kept = self.f.forward(saved)
        return self.f.backward(self.g.backward(dy, z, wgrad), kept, wgrad)

    def backward_onto(self, dy: Any, saved: Any, wgrad: WGrad, onto: Array) -> Array:
        z, kept = self.f.forward(saved)
        return self.f.backward_onto(self.g.backward(dy, z, wgrad), kept, wgrad, onto)


def recompute(block: Sequential, kind: str) -> Module:
    """``block`` (of ``models.transformer.block``), making again what ``kind`` names ("none" among them).

    The names of the parameters stay. The block itself is changed, unless ``kind`` is "none" or "full".
    """
    if kind == "none":
        return block
    if kind == "full":
        return Recompute(block)
    for part in block.layers.values():
        if isinstance(part, Sequential):
            for first, last in UNITS[kind]:
                part.group(first, last, RecomputeInput)
    return block
