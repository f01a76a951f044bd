"""Module: a differentiable map written as a forward and its hand-written backward.

    y, saved = module.forward(x)
    dx       = module.backward(dy, saved, wgrad)

With y = f(x, w): dx = (df/dx)^T dy, and wgrad adds (df/dw)^T dy into ``Parameter.grad``. ``saved`` is whatever
backward needs: what it holds *is* the layer's memory policy, and dropping it frees the memory. ``wgrad`` decides
*when* weight gradients are computed (see ``wgrad.py``). A module never changes its input or ``dy`` in place, but for
two, and what feeds these keeps nothing of what it gives them: the loss (``layers/loss.py``), whose backward writes over
the logits, and rotary positions (``Rope`` in ``layers/attention.py``), which turn queries, keys and their gradients
where they lie.

Activations are sequence-first, (sequence, batch, hidden), so that a shard of the sequence is contiguous in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from . import kernels, random
from .arrays import Array, wide
from .comm.mesh import DATA as DATA
from .wgrad import WGrad

Index = tuple[slice, ...]
Initial = Callable[["Parameter", int, ModuleType], Array]


class Parameter:
    """A local shard of a global array, its gradient, and where the shard lies in the whole.

    name: stable whatever the layout (``blocks/7/mlp/up/weight``). shape: of the whole. index: the hyperslab of the
    whole that this rank holds. owned: the part of ``index`` (in the whole's coordinates) that this rank counts in norms
    and writes to checkpoints; over the ranks of one model replica the owned parts tile the whole exactly once.
    replicas: the mesh axes over which the whole shard is copied, each rank seeing other data: ``grad`` owes a sum over
    them, and ZeRO shards it over them. shared: the further axes over which ``grad`` owes a sum: shards that overlap or
    are copies each hold only a part of it. overlaps: that sum is over shards that overlap without being equal.
    derived: what layers have made of ``data`` and keep, with the ``version`` that it was made of; whoever changes
    ``data`` adds one to that, and whoever takes it away sets ``derived`` to None.
    decay: whether weight decay applies. matrix: (stack, rows): the leading axes that count independent matrices, and
    the axes after them that make a matrix's rows; None for what is no matrix of a hidden layer. uses: how many modules
    of this rank add to ``grad``.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        index: Index | None = None,
        *,
        owned: Index | None = None,
        initial: Initial | None = None,
        decay: bool = True,
        replicas: tuple[str, ...] = DATA,
        shared: tuple[str, ...] = (),
        overlaps: bool = False,
        matrix: tuple[int, int] | None = None,
        name: str = "",
    ) -> None:
        self.shape = tuple(shape)
        self.index: Index = index if index is not None else tuple(slice(0, n) for n in shape)
        self.owned: Index = owned if owned is not None else self.index
        self.initial = initial or normal(0.02)
        self.replicas, self.shared, self.overlaps = replicas, shared, overlaps
        self.decay, self.matrix, self.name = decay, matrix, name
        self.uses = 0
        self.data: Array = None
        self.grad: Array = None
        self.version = 0
        self.derived: Any = None

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of ``data`` and ``grad``."""
        return tuple(s.stop - s.start for s in self.index)

    @property
    def owned_local(self) -> Index:
        """``owned`` in the coordinates of ``data``."""
        return tuple(slice(o.start - s.start, o.stop - s.start) for o, s in zip(self.owned, self.index, strict=True))

    def __repr__(self) -> str:
        return f"Parameter({self.name!r}, shape={self.shape}, local={self.local_shape})"


def normal(std: float) -> Initial:
    """N(0, std^2), by global index: the same numbers whatever the shard."""

    def draw(p: Parameter, seed: int, xp: ModuleType) -> Array:
        return std * random.normal_slab(random.key(seed, p.name), p.shape, p.index, xp)

    return draw


def constant(value: float) -> Initial:
    """Every element the same."""
    return lambda p, seed, xp: xp.full(p.local_shape, value)


class Module:
    """A differentiable map; see the head of this file.

    input_stays: whether the input is there in the backward for another reason. A layer that could keep less than its
    input then keeps that, and nothing else.
    """

    input_stays = False

    def forward(self, x: Any) -> tuple[Any, Any]:
        """(y, saved)."""
        raise NotImplementedError

    def backward(self, dy: Any, saved: Any, wgrad: WGrad) -> Any:
        """dx; weight gradients go through ``wgrad``."""
        raise NotImplementedError

    def forward_onto(self, x: Any, onto: Array) -> tuple[Array, Any]:
        """(onto + y, saved): where the kernel that makes y can add it, a pass over memory less than adding it after."""
        y, saved = self.forward(x)
        return kernels.of(y).add(onto, y), saved

    def backward_onto(self, dy: Any, saved: Any, wgrad: WGrad, onto: Array) -> Array:
        """onto + dx, in the same way."""
        dx = self.backward(dy, saved, wgrad)
        return kernels.of(dx).add(onto, dx)

    def members(self) -> Iterator[tuple[str, Parameter | Module]]:
        """The parameters and modules held directly, with their names: an attribute's own, or the key in a container."""
        for attribute, value in vars(self).items():
            entries: Any = [(attribute, value)]
            if isinstance(value, dict):
                entries = value.items()
            elif isinstance(value, list | tuple):
                entries = enumerate(value)
            for name, item in entries:
                if isinstance(item, Parameter | Module):
                    yield str(name), item

    def walk(self, path: str = "") -> Iterator[tuple[str, Module, Parameter]]:
        """(name, module that holds it, parameter) for every use of a parameter, in the order of the forward."""
        for name, item in self.members():
            where = "/".join(part for part in (path, name) if part)
            if isinstance(item, Parameter):
                yield where, self, item
            else:
                yield from item.walk(where)

    def parameters(self) -> list[Parameter]:
        """Every parameter once, in the order of first use; names it by its path if it has no name yet."""
        found: dict[int, Parameter] = {}
        uses: dict[int, int] = {}
        for name, _, p in self.walk():
            p.name = p.name or name
            found[id(p)] = p
            uses[id(p)] = uses.get(id(p), 0) + 1
        for p in found.values():
            p.uses = uses[id(p)]
        return list(found.values())

    def initialise(self, seed: int = 0, dtype: DTypeLike = np.float32, xp: ModuleType = np) -> list[Parameter]:
        """Give every parameter its initial value and a zero gradient, allocating what is not there; returns them.

        Gradients are in ``arrays.wide(dtype)``: float32 for weights of 16 bits.
        """
        parameters = self.parameters()
        for p in parameters:
            if p.data is None:
                p.data = xp.empty(p.local_shape, dtype)
                p.grad = xp.zeros(p.local_shape, wide(dtype))
            p.data[...] = p.initial(p, seed, xp)
            p.version += 1
            p.grad[...] = 0
        return parameters


class Sequential(Module):
    """f_n o ... o f_1: the chain rule, written once. Layers are named by keyword, or by position."""

    def __init__(self, *layers: Module, **named: Module) -> None:
        self.layers: dict[str, Module] = {str(i): layer for i, layer in enumerate(layers)} | named
        self.groups: set[str] = set()

    def members(self) -> Iterator[tuple[str, Parameter | Module]]:
        for name, layer in self.layers.items():
            yield "" if name in self.groups else name, layer

    def group(self, first: str, last: str, make: Callable[..., Module]) -> None:
        """Make one layer, ``make(**layers)``, of those from ``first`` to ``last``, if both are there; no parameter's
        name changes."""
        names = list(self.layers)
        if first in names and last in names:
            joined = names[names.index(first) : names.index(last) + 1]
            made = make(**{name: self.layers[name] for name in joined})
            key = " ".join(joined)
            self.groups.add(key)
            entries = [(key, made) if name == first else (name, self.layers[name]) for name in names]
            self.layers = dict(entry for entry in entries if entry[0] not in joined)

    def forward(self, x: Any) -> tuple[Any, Any]:
        saved = []
        for layer in self.layers.values():
            x, kept = layer.forward(x)
            saved.append(kept)
        return x, saved

    def backward(self, dy: Any, saved: Any, wgrad: WGrad) -> Any:
        for layer in reversed(self.layers.values()):
            dy = layer.backward(dy, saved.pop(), wgrad)  # frees each activation as soon as it is used
        return dy

    def forward_onto(self, x: Any, onto: Array) -> tuple[Array, Any]:
        if not self.layers:
            return kernels.of(x).add(onto, x), []
        *first, last = self.layers.values()
        saved = []
        for layer in first:
            x, kept = layer.forward(x)
            saved.append(kept)
        y, kept = last.forward_onto(x, onto)
        return y, [*saved, kept]

    def backward_onto(self, dy: Any, saved: Any, wgrad: WGrad, onto: Array) -> Array:
        if not self.layers:
            return kernels.of(dy).add(onto, dy)
        first, *others = self.layers.values()
        for layer in reversed(others):
            dy = layer.backward(dy, saved.pop(), wgrad)
        return first.backward_onto(dy, saved.pop(), wgrad, onto)


class Residual(Sequential):
    """x + f(x): the sum rule, written once. The last layer adds x to its y, and the first dy to its dx."""

    def forward(self, x: Any) -> tuple[Any, Any]:
        return super().forward_onto(x, x)

    def backward(self, dy: Any, saved: Any, wgrad: WGrad) -> Any:
        return super().backward_onto(dy, saved, wgrad, dy)

    forward_onto, backward_onto = Module.forward_onto, Module.backward_onto


class Recompute(Module):
    """f, keeping only its input: forward runs again when backward needs the rest.

    Chen, Xu, Zhang and Guestrin, "Training deep nets with sublinear memory cost", 2016.
    """

    def __init__(self, inner: Module) -> None:
        self.inner = inner

    def members(self) -> Iterator[tuple[str, Parameter | Module]]:
        yield "", self.inner  # recomputing changes no parameter's name

    def forward(self, x: Any) -> tuple[Any, Any]:
        return self.inner.forward(x)[0], x

    def backward(self, dy: Any, saved: Any, wgrad: WGrad) -> Any:
        return self.inner.backward(dy, self.inner.forward(saved)[1], wgrad)
