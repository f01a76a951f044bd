"""Backward against central differences of forward, on one rank or several."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import wgrad
from ..arrays import array_module, to_host
from ..comm.base import Communicator, Solo
from ..module import Module, Parameter
from .group import Group, Host, complete, copy, draw, leaves, prepare, rms


def gradcheck(
    module: Module,
    x: Any,
    *,
    layout: str = "VV",
    comm: Communicator | None = None,
    seed: int = 0,
    elementwise: int = 32,
    step: float = 1e-5,
    tolerance: float = 1e-6,
) -> dict[str, float]:
    """Backward against central differences of forward, in float64, for the input and every parameter.

    With L(x, w) = <f(x, w), dy> for a random dy, and for each vector z of x and the parameters, in directions d:

        (L(z + h d) - L(z - h d)) / 2h  =  <dL/dz, d>

    d runs through random directions, or through every unit vector if the whole of z has at most ``elementwise`` numbers.
    On several ranks all perturb the same global z: for a parameter by its ``index``, its gradient taken after the sum it
    owes (``Parameter.shared``) and counted by ``owned``, so that those are checked too.

    x: an array or a tuple of arrays of this rank; integer arrays (tokens, targets) have no gradient. layout: of x and of
    the output over ``comm``, such as "IV" for a column-parallel layer; without ``comm`` the check is serial. The module's
    parameters are given values (see ``prepare``). Also asserts that forward and backward leave their inputs as they were,
    and that weight gradients are added to what is there.

    Returns the error of x ("input") and of each parameter, relative to the size of the gradient; asserts that all are
    below ``tolerance``.
    """
    group = Group(comm or Solo(), array_module(leaves(x)[0]))
    parameters = prepare(module, seed, group.xp)
    x = copy(x)
    before = [leaf.copy() for leaf in leaves(x)]
    y, saved = module.forward(x)
    dys = [group.xp.asarray(draw(leaf.shape, layout[1], group.comm, seed + i)) for i, leaf in enumerate(leaves(y), 1)]
    dys_before = [dy.copy() for dy in dys]
    for p in parameters:
        p.grad[...] = 1
    dx = module.backward(tuple(dys) if isinstance(y, tuple) else dys[0], saved, wgrad.now)
    same = all((a == b).all() for a, b in zip([*leaves(x), *dys], [*before, *dys_before], strict=True))
    group.agree("" if same else f"{type(module).__name__} changed its input or dy")

    def objective() -> float:
        ys = leaves(module.forward(x)[0])
        local = group.gather(sum(float((leaf * dy).sum()) for leaf, dy in zip(ys, dys, strict=True)))
        return float(local[0] if layout[1] == "I" else local.sum())

    vectors = {}
    inputs = [leaf for leaf in leaves(x) if leaf.dtype.kind == "f"]
    for i, (leaf, gradient) in enumerate(zip(inputs, leaves(dx), strict=True) if inputs else ()):
        name = "input" if len(inputs) == 1 else f"input {i}"
        vectors[name] = leaf, *_whole(name, to_host(gradient), *_places(leaf.shape, layout[0], group), group)
    for p in parameters:
        p.grad -= 1
        vectors[p.name] = p.data, *_whole(p.name, complete(p, group.comm), *_shard(p), group)

    floor = 1e-2 * max(rms(gradient) for _, gradient, _ in vectors.values())
    errors = {}
    for name, (array, gradient, places) in vectors.items():
        kept = array.copy()
        errors[name] = 0.0
        for d in _directions(gradient.size, elementwise, seed):
            move = group.xp.asarray(step * d[places])
            ends = []
            for sign in 1, -1:
                array[...] = kept + sign * move
                ends.append(objective())
            array[...] = kept
            numeric, analytic = (ends[0] - ends[1]) / (2 * step), float(gradient @ d)
            scale = abs(analytic) + (rms(gradient) + floor) * float(np.linalg.norm(d)) + 1e-300
            errors[name] = max(errors[name], abs(numeric - analytic) / scale)
    group.check(errors, tolerance, f"{type(module).__name__}: backward differs from central differences")
    return errors


def _directions(n: int, elementwise: int, seed: int) -> list[Host]:
    return list(np.eye(n)) if n <= elementwise else list(np.random.default_rng((seed, n)).standard_normal((2, n)))


def _places(shape: tuple[int, ...], layout: str, group: Group) -> tuple[Host, Host, int]:
    """Where each number of a distributed array stands in the flat whole, whether this rank counts it, and how many there are."""
    n = math.prod(shape)
    if layout == "I":
        return np.arange(n).reshape(shape), np.full(shape, group.comm.rank == 0), n
    sizes = group.gather(n).astype(int)
    return sizes[: group.comm.rank].sum() + np.arange(n).reshape(shape), np.full(shape, True), int(sizes.sum())


def _shard(p: Parameter) -> tuple[Host, Host, int]:
    """The same of a parameter."""
    n = math.prod(p.shape)
    counted = np.full(p.local_shape, False)
    counted[p.owned_local] = True
    return np.arange(n).reshape(p.shape)[p.index], counted, n


def _whole(name: str, local: Host, places: Host, counted: Host, n: int, group: Group) -> tuple[Host, Host]:
    """The flat whole of a gradient of which ranks hold parts, the same wherever they overlap; and ``places``."""
    group.agree("" if local.shape == places.shape else f"{name}: gradient of shape {local.shape}, not {places.shape}")
    flat = np.zeros(n)
    flat[places[counted]] = local[counted]
    flat = group.sum(flat)
    worst = float(np.abs(flat[places] - local).max(initial=0))
    group.agree("" if worst <= 1e-9 * (1 + np.abs(flat).max(initial=0)) else f"{name}: gradients differ between ranks")
    return flat, places
