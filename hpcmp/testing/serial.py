"""A sharded module against the serial one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import wgrad
from ..arrays import array_module, to_host
from ..comm.base import Communicator
from ..layers.parallel import TensorParallel
from ..module import Module, Parameter
from .group import Group, complete, draw, leaves, prepare

Cut = Callable[[Any, TensorParallel], Any]


def equals_serial(
    build: Callable[[TensorParallel], Module],
    parallel: TensorParallel,
    x: Any,
    *,
    cut_x: Cut | None = None,
    cut_y: Cut | None = None,
    seed: int = 0,
    tolerance: float = 1e-12,
) -> dict[str, float]:
    """``build(parallel)`` computes what ``build(TensorParallel())`` does: the output, dx and every parameter's gradient.

    x: the whole input, the same on every rank, an array or a tuple of arrays. cut_x and cut_y: what this rank holds of
    an array that lies as the input, or as the output, does: ``activations`` by default, else ``whole``, ``share(axis)``
    or a function of your own. The serial module runs on every rank, on the same cursor. Parameters are matched by name
    and compared, after the sum that their gradient owes over ``parallel.tp``, with the slab ``index`` of the serial
    gradient; their owned parts must tile the whole exactly once. In the dtype float64.

    Returns the largest error of the "output", of the "input" gradient and of each parameter's, relative to the serial
    array's largest number (or to a thousandth of the largest of all, where that is more); asserts that all are below
    ``tolerance``.
    """
    cut_x, cut_y = cut_x or activations, cut_y or activations
    group = Group(parallel.tp, array_module(leaves(x)[0]))
    serial, sharded = build(TensorParallel(cursor=parallel.cursor)), build(parallel)
    wholes = {p.name: p for p in prepare(serial, seed, group.xp)}
    shards = {p.name: p for p in prepare(sharded, seed, group.xp)}
    shapes = [{name: p.shape for name, p in some.items()} for some in (wholes, shards)]
    group.agree("" if shapes[0] == shapes[1] else f"parameters differ: serial {shapes[0]}, here {shapes[1]}")
    assert_owned_once(list(shards.values()), parallel.tp)

    y, saved = serial.forward(x)
    dys = [group.xp.asarray(draw(leaf.shape, "I", parallel.tp, seed + i)) for i, leaf in enumerate(leaves(y), 1)]
    dy = tuple(dys) if isinstance(y, tuple) else dys[0]
    dx = serial.backward(dy, saved, wgrad.now)
    y_here, saved = sharded.forward(cut_x(x, parallel))
    dx_here = sharded.backward(cut_y(dy, parallel), saved, wgrad.now)

    slabs = {name: (complete(p, parallel.tp), wholes[name].grad[p.index]) for name, p in shards.items()}
    found = {"output": (y_here, cut_y(y, parallel)), **slabs}
    largest = {"output": _largest(y)} | {name: _largest(p.grad) for name, p in wholes.items()}
    if dx is not None:
        found["input"], largest["input"] = (dx_here, cut_x(dx, parallel)), _largest(dx)
    errors, floor = {}, max(1e-3 * max(largest.values()), 1e-300)
    for name, (here, expected) in found.items():
        shapes = [[np.shape(leaf) for leaf in leaves(value)] for value in (here, expected)]
        group.agree("" if shapes[0] == shapes[1] else f"{name}: shape {shapes[0]}, not {shapes[1]}")
        difference = [to_host(a) - to_host(b) for a, b in zip(leaves(here), leaves(expected), strict=True)]
        errors[name] = group.most(_largest(tuple(difference))) / max(largest[name], floor)
    group.check(errors, tolerance, f"{type(serial).__name__} on {parallel.tp.size} ranks differs from serial")
    return errors


def assert_owned_once(parameters: list[Parameter], comm: Communicator) -> None:
    """Over the ranks of ``comm`` the owned parts lie inside the shards, and tile every parameter exactly once."""
    for p in parameters:
        group, count = Group(comm, array_module(p.data)), np.zeros(p.shape)
        count[p.owned] = 1
        empty = not count.any()
        inside = empty or all(s.start <= o.start and o.stop <= s.stop for o, s in zip(p.owned, p.index, strict=True))
        group.agree("" if inside else f"{p.name}: owned {p.owned} is not inside index {p.index}")
        count = group.sum(count)
        wrong = f"{p.name}: owned between {count.min(initial=1):g} and {count.max(initial=1):g} times, not once"
        group.agree("" if (count == 1).all() else wrong)


def activations(x: Any, parallel: TensorParallel) -> Any:
    """What a rank holds of an activation between layers: its positions, the first axis, under sequence parallelism."""
    return tuple(leaf[parallel.positions()] for leaf in x) if isinstance(x, tuple) else x[parallel.positions()]


def whole(x: Any, parallel: TensorParallel) -> Any:
    """What a rank holds of an array that all ranks hold: all of it."""
    return x


def share(axis: int) -> Cut:
    """What a rank holds of an array of which ``axis`` is sharded evenly."""

    def cut(x: Any, parallel: TensorParallel) -> Any:
        index = [slice(None)] * x.ndim
        index[axis] = parallel.tp.part(x.shape[axis])
        return x[tuple(index)]

    return cut


def _largest(x: Any) -> float:
    """The largest magnitude; nan if any number is."""
    return float(np.max([np.abs(to_host(leaf)).max(initial=0) for leaf in leaves(x)], initial=0))
