"""Backward against central differences of forward, on one rank or several."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import wgrad
from ..arrays import Array, array_module, to_host
from ..comm.base import Communicator, Solo
from ..comm.mesh import Mesh
from ..module import Module, Parameter
from .group import Group, Host, check, complete, copy, dot, draw, leaves, pack, prepare, rms, shapes


def gradcheck(
    module: Module,
    x: Any,
    *,
    layout: str = "VV",
    comm: Communicator | None = None,
    mesh: Mesh | None = None,
    seed: int = 0,
    elementwise: int = 32,
    step: float = 1e-5,
    tolerance: float = 1e-6,
) -> dict[str, float]:
    """Backward against central differences of forward, in float64, for the input and every parameter.

    With L(x, w) = <f(x, w), dy> for a random dy, and for each vector z among x and the parameters, in directions d:

        (L(z + h d) - L(z - h d)) / 2h  =  <dL/dz, d>

    d runs through two random directions, or through every unit vector if the whole of z has at most ``elementwise``
    numbers. On several ranks all perturb the same global z: a parameter by its ``index``, with its gradient taken after
    the sum that it owes (``Parameter.shared``) and counted by ``owned``, so that those are checked too.

    x: an array or a tuple of arrays of this rank; integer arrays (tokens, targets) have no gradient. layout: of x and
    of the output over ``comm``, such as "IV" for a column-parallel layer; without ``comm`` the check is serial. mesh:
    see ``equals_serial``; ``comm`` is then all of it. The module's parameters are given values (see ``prepare``). Also
    asserts that forward and backward leave their inputs as they were, and that weight gradients are added to what is
    there.

    Returns the error of x ("input") and of each parameter, relative to the size of the gradient; asserts that all are
    at most ``tolerance``.
    """
    group = Group(mesh[mesh.axes] if mesh else comm or Solo(), array_module(leaves(x)[0]))
    parameters = prepare(module, seed, group.xp)
    x = copy(x)
    x_before = copy(x)
    y, saved = module.forward(x)
    dys = [group.xp.asarray(draw(np.shape(v), layout[1], group.comm, seed + i)) for i, v in enumerate(leaves(y), 1)]
    dys_before = [dy.copy() for dy in dys]
    for p in parameters:
        p.grad[...] = 1
    dx = module.backward(pack(dys, y), saved, wgrad.now)
    same = all((a == b).all() for a, b in zip([*leaves(x), *dys], [*leaves(x_before), *dys_before], strict=True))
    group.agree("" if same else f"{type(module).__name__} changed its input or dy")
    for p in parameters:
        p.grad -= 1

    vectors = _inputs(x, dx, layout[0], group) + [_parameter(p, group, mesh) for p in parameters]
    wholes = [vector.whole(group) for vector in vectors]
    unlike = [v.name for v, whole in zip(vectors, wholes, strict=True) if not v.agrees(whole)]
    group.agree(f"gradients differ between ranks that hold the same numbers: {unlike}" if unlike else "")

    numbers: list[float] = []  # of this rank, gathered once
    for vector in vectors:
        kept = vector.array.copy()
        for d in vector.directions(elementwise, seed):
            for sign in step, -step:
                vector.array[...] = kept + group.xp.asarray(sign * d[vector.places])
                ys = leaves(module.forward(x)[0])
                numbers.append(sum(dot(leaf, dy) for leaf, dy in zip(ys, dys_before, strict=True)))
        vector.array[...] = kept
    ranks = group.gather(numbers)
    ends = iter((ranks[0] if layout[1] == "I" else ranks.sum(0)).reshape(-1, 2))

    errors, floor = {}, 1e-2 * max(map(rms, wholes), default=0.0)
    for vector, whole in zip(vectors, wholes, strict=True):
        errors[vector.name] = 0.0
        for d in vector.directions(elementwise, seed):
            after, before = next(ends)
            numeric, analytic = (after - before) / (2 * step), dot(whole, d)
            scale = abs(analytic) + (rms(whole) + floor) * math.sqrt(dot(d, d))
            errors[vector.name] = max(errors[vector.name], abs(numeric - analytic) / max(scale, 1e-300))
    check(errors, tolerance, f"{type(module).__name__}: backward differs from central differences")
    return errors


@dataclass(frozen=True)
class _Vector:
    """An array of which ranks hold parts, its gradient, and where each number stands in the flat whole of ``size``."""

    name: str
    array: Array
    gradient: Host
    places: Host
    counted: Host  # whether this rank counts the number
    size: int

    def whole(self, group: Group) -> Host:
        """The flat gradient, each number as the rank that counts it has it."""
        flat = np.zeros(self.size)
        flat[self.places[self.counted]] = self.gradient[self.counted]
        return group.sum(flat)

    def agrees(self, whole: Host) -> bool:
        """Whether this rank's gradient is the whole's, also where another rank counts it."""
        return bool(
            np.abs(whole[self.places] - self.gradient).max(initial=0) <= 1e-9 * (1 + np.abs(whole).max(initial=0))
        )

    def directions(self, elementwise: int, seed: int) -> list[Host]:
        """The directions in which the whole is perturbed, the same on every rank."""
        if self.size <= elementwise:
            return list(np.eye(self.size))
        return list(np.random.default_rng((seed, self.size)).standard_normal((2, self.size)))


def _parameter(p: Parameter, group: Group, mesh: Mesh | None) -> _Vector:
    counted = np.full(p.local_shape, False)
    counted[p.owned_local] = True
    places = np.arange(math.prod(p.shape)).reshape(p.shape)[p.index]
    return _Vector(p.name, p.data, complete(p, group.comm, mesh), places, counted, math.prod(p.shape))


def _inputs(x: Any, dx: Any, layout: str, group: Group) -> list[_Vector]:
    arrays = [leaf for leaf in leaves(x) if leaf.dtype.kind == "f"]
    gradients = [to_host(leaf) for leaf in leaves(dx)]
    wrong = [g.shape for g in gradients] != [a.shape for a in arrays]
    group.agree(f"dx has shapes {shapes(dx)} for inputs of {[a.shape for a in arrays]}" if wrong else "")
    sizes = group.gather([a.size for a in arrays]).astype(int)
    found = []
    for i, (array, gradient) in enumerate(zip(arrays, gradients, strict=True)):
        places, mine, size = np.arange(array.size).reshape(array.shape), group.comm.rank == 0, array.size
        if layout != "I":
            places, mine, size = places + sizes[: group.comm.rank, i].sum(), True, int(sizes[:, i].sum())
        name = "input" if len(arrays) == 1 else f"input {i}"
        found.append(_Vector(name, array, gradient, places, np.full(array.shape, mine), size))
    return found
