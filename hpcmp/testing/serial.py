"""A sharded module against the serial one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import wgrad
from ..arrays import array_module, to_host
from ..comm.base import Communicator
from ..comm.mesh import Mesh
from ..layers.parallel import ModelParallel
from ..module import Module, Parameter
from .group import Group, check, complete, draw, leaves, pack, prepare, shapes

Cut = Callable[[Any, ModelParallel], Any]


def equals_serial(
    build: Callable[[ModelParallel], Module],
    parallel: ModelParallel,
    x: Any,
    *,
    mesh: Mesh | None = None,
    cut_x: Cut | None = None,
    cut_y: Cut | None = None,
    seed: int = 0,
    tolerance: float = 1e-12,
) -> dict[str, float]:
    """``build(parallel)`` computes what ``build(ModelParallel())`` does: output, dx and every parameter's gradient.

    x: the whole input, the same on every rank, an array or a tuple of arrays. cut_x and cut_y: what this rank holds of
    an array that lies as the input, or as the output, does: ``activations`` by default, else ``whole``, ``share(axis)``
    or a function of your own. mesh: that of ``parallel``'s groups where it has more than tp, all its ranks being of one
    replica (axes tp, tp_y and cp). The serial module runs on every rank, on the same cursor. Parameters are matched by
    name and compared, after the sum that their gradient owes, with the slab ``index`` of the serial gradient; their
    owned parts must tile the whole exactly once. In the dtype float64.

    Returns the largest error of the "output", of the "input" gradient and of each parameter's, relative to the serial
    array's largest number (or to a thousandth of the largest of all, where that is more); asserts that all are below
    ``tolerance``.
    """
    cut_x, cut_y = cut_x or activations, cut_y or activations
    comm = mesh[mesh.axes] if mesh else parallel.tp
    group = Group(comm, array_module(leaves(x)[0]))
    serial, sharded = build(ModelParallel(cursor=parallel.cursor)), build(parallel)
    name = f"{type(serial).__name__} on {comm.size} ranks"
    wholes = {p.name: p for p in prepare(serial, seed, group.xp)}
    shards = {p.name: p for p in prepare(sharded, seed, group.xp)}
    expected, here = ({name: p.shape for name, p in some.items()} for some in (wholes, shards))
    group.agree("" if here == expected else f"{name}: parameters {here}, and serial {expected}")
    assert_owned_once(list(shards.values()), mesh["tp_y", "tp"] if mesh else comm)

    y, saved = serial.forward(x)
    dys = [group.xp.asarray(draw(np.shape(v), "I", comm, seed + i)) for i, v in enumerate(leaves(y), 1)]
    dy = pack(dys, y)
    dx = serial.backward(dy, saved, wgrad.now)
    y_here, saved = sharded.forward(cut_x(x, parallel))
    dx_here = sharded.backward(cut_y(dy, parallel), saved, wgrad.now)

    slabs = {"output": (y_here, cut_y(y, parallel)), "input": (dx_here, None if dx is None else cut_x(dx, parallel))}
    slabs |= {name: (complete(p, comm, mesh), wholes[name].grad[p.index]) for name, p in shards.items()}
    unlike = [f"{k} has shape {shapes(a)}, not {shapes(b)}" for k, (a, b) in slabs.items() if shapes(a) != shapes(b)]
    group.agree(f"{name}: {', '.join(unlike)}" if unlike else "")
    differences = group.gather([_difference(*pair) for pair in slabs.values()]).max(0)
    sizes = [_largest(y), _largest(dx), *(_largest(wholes[name].grad) for name in shards)]
    floor = max(1e-3 * max(sizes), 1e-300)
    errors = {k: float(d / max(n, floor)) for k, d, n in zip(slabs, differences, sizes, strict=True)}
    check(errors, tolerance, f"{name} differs from serial")
    return errors


def assert_owned_once(parameters: list[Parameter], comm: Communicator) -> None:
    """Over the ranks of ``comm`` the owned parts lie inside the shards, and tile every parameter exactly once."""
    if not parameters:
        return
    group, counts, outside = Group(comm, array_module(parameters[0].data)), [], []
    for p in parameters:
        count = np.zeros(p.shape)
        count[p.owned] = 1
        inside = all(s.start <= o.start and o.stop <= s.stop for o, s in zip(p.owned, p.index, strict=True))
        outside += [f"{p.name}: owned {p.owned} is not inside index {p.index}"] if count.any() and not inside else []
        counts.append(count.reshape(-1))
    group.agree("; ".join(outside))
    ends = np.cumsum([count.size for count in counts])[:-1]
    found = dict(zip((p.name for p in parameters), np.split(group.sum(np.concatenate(counts)), ends), strict=True))
    wrong = [f"{name}: {count.min():g} to {count.max():g} times" for name, count in found.items() if (count != 1).any()]
    if wrong:
        raise AssertionError(f"not owned exactly once: {'; '.join(wrong)}")


def activations(x: Any, parallel: ModelParallel) -> Any:
    """What a rank holds of an activation between layers: its positions, the first axis, under sequence and context
    parallelism, and its share over tp_y of hidden, the last."""
    if isinstance(x, tuple):
        return tuple(activations(leaf, parallel) for leaf in x)
    return x[parallel.positions()][..., parallel.tp_y.part(x.shape[-1])]


def whole(x: Any, parallel: ModelParallel) -> Any:
    """What a rank holds of an array that all ranks hold: all of it."""
    return x


def share(axis: int) -> Cut:
    """What a rank holds of an array of which ``axis`` is sharded evenly."""

    def cut(x: Any, parallel: ModelParallel) -> Any:
        index = [slice(None)] * x.ndim
        index[axis] = parallel.tp.part(x.shape[axis])
        return x[tuple(index)]

    return cut


def _largest(x: Any) -> float:
    """The largest magnitude; nan if any number is."""
    return float(np.max([np.abs(to_host(leaf)).max(initial=0) for leaf in leaves(x)], initial=0))


def _difference(a: Any, b: Any) -> float:
    return max((_largest(x - y) for x, y in zip(leaves(a), leaves(b), strict=True)), default=0.0)
