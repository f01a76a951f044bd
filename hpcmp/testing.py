"""Checks that any collective or layer must pass; public, so that you can test your own with them.

Vectors lie over the ranks of a group in one of three layouts (see ``hpcmp.collectives``), each with an inner product:

    I  invariant  the same array on every rank, counted once    <a, b> = a . b
    V  varying    an array of its own on each rank              <a, b> = sum_r a_r . b_r
    P  partial    each rank holds a summand                     <a, b> = sum_r a_r . b_r

The checks are collective over their group: every rank calls them, and if any rank finds an error, every rank raises the
same ``AssertionError``, so that a failing check never leaves the others waiting. On NumPy and CuPy arrays alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import random, wgrad
from .arrays import Array, array_module, to_host
from .collectives import Collective
from .comm.base import Communicator, Op, Solo
from .layers.parallel import TensorParallel
from .module import Module, Parameter

Host = NDArray[Any]
Cut = Callable[[Any, TensorParallel], Any]


def draw(
    shape: tuple[int, ...], layout: str, comm: Communicator, seed: int = 0, dtype: DTypeLike = np.float64
) -> Host:
    """Standard normal numbers: the same on every rank of ``comm`` for layout I, different for V and P."""
    rank = 0 if layout == "I" else 1 + comm.rank
    return np.asarray(np.random.default_rng((seed, rank)).standard_normal(shape)).astype(dtype)


def inner(a: Array, b: Array, layout: str, comm: Communicator) -> float:
    """<a, b> in float64; an invariant pair is counted once. Raises on every rank if ranks disagree about that one."""
    local = float(np.vdot(to_host(a).astype(np.float64), to_host(b).astype(np.float64)))
    everyone = _Group(comm, array_module(a)).gather(local)
    if layout != "I":
        return float(everyone.sum())
    size = math.sqrt(max(_square(a), 1e-300) * max(_square(b), 1e-300))
    spread = float(np.ptp(everyone))
    _Group(comm, array_module(a)).agree(
        f"an invariant array differs between ranks: <a, b> = {everyone}" if not spread <= 1e-5 * size else ""
    )
    return float(everyone[0])


def assert_adjoint(
    op: Collective,
    shape: tuple[int, ...],
    *,
    dtype: DTypeLike = np.float64,
    seed: int = 0,
    tolerance: float | None = None,
    xp: ModuleType = np,
) -> None:
    """<A x, y> = <x, A^T y> for random x and y in the layouts of ``op``: the one property from which backward is right.

    shape: of x on this rank; it may differ between ranks where the layout varies. tolerance: of the difference, relative
    to ||A x|| ||y|| (50 units of rounding, by default). Also asserts that both results keep the dtype, that A^T y is
    shaped as x, that x and y are left as they were, and that (A^T)^T is A's own kind.
    """
    source, target = op.layout
    group = _Group(op.comm, xp)
    x = xp.asarray(draw(shape, source, op.comm, seed, dtype))
    x_before = x.copy()
    ax = op(x)
    y = xp.asarray(draw(ax.shape, target, op.comm, seed + 1, dtype))
    y_before = y.copy()
    aty = op.T(y)
    name, back = type(op).__name__, type(op.T).__name__
    problem = ""
    if ax.dtype != x.dtype or aty.dtype != y.dtype:
        problem = f"{name}: dtype {x.dtype} became {ax.dtype}, and {aty.dtype} in the adjoint"
    elif aty.shape != x.shape:
        problem = f"{name}: {back} returns shape {aty.shape} for an x of shape {x.shape}"
    elif type(op.T.T) is not type(op):
        problem = f"{name}: the adjoint of its adjoint {back} is {type(op.T.T).__name__}"
    elif not (x == x_before).all() or not (y == y_before).all():
        problem = f"{name}: it or {back} changed its input"
    group.agree(problem)
    left, right = inner(ax, y, target, op.comm), inner(x, aty, source, op.comm)
    scale = math.sqrt(sum(group.gather(_square(ax))) * sum(group.gather(_square(y))))
    limit = (50 * float(np.finfo(dtype).eps) if tolerance is None else tolerance) * scale
    group.agree(
        "" if abs(left - right) <= limit else f"{name}: <A x, y> = {left!r}, but <x, A^T y> = {right!r} with A^T {back}"
    )


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
    group = _Group(comm or Solo(), array_module(_leaves(x)[0]))
    parameters = prepare(module, seed, group.xp)
    x = _copy(x)
    before = [leaf.copy() for leaf in _leaves(x)]
    y, saved = module.forward(x)
    dys = [group.xp.asarray(draw(leaf.shape, layout[1], group.comm, seed + i)) for i, leaf in enumerate(_leaves(y), 1)]
    dys_before = [dy.copy() for dy in dys]
    for p in parameters:
        p.grad[...] = 1
    dx = module.backward(tuple(dys) if isinstance(y, tuple) else dys[0], saved, wgrad.now)
    same = all((a == b).all() for a, b in zip([*_leaves(x), *dys], [*before, *dys_before], strict=True))
    group.agree("" if same else f"{type(module).__name__} changed its input or dy")

    def objective() -> float:
        ys = _leaves(module.forward(x)[0])
        local = group.gather(sum(float((leaf * dy).sum()) for leaf, dy in zip(ys, dys, strict=True)))
        return float(local[0] if layout[1] == "I" else local.sum())

    vectors = {}
    inputs = [leaf for leaf in _leaves(x) if leaf.dtype.kind == "f"]
    for i, (leaf, gradient) in enumerate(zip(inputs, _leaves(dx), strict=True) if inputs else ()):
        name = "input" if len(inputs) == 1 else f"input {i}"
        vectors[name] = leaf, *_whole(name, to_host(gradient), *_places(leaf.shape, layout[0], group), group)
    for p in parameters:
        p.grad -= 1
        vectors[p.name] = p.data, *_whole(p.name, complete(p, group.comm), *_shard(p), group)

    floor = 1e-2 * max(_rms(gradient) for _, gradient, _ in vectors.values())
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
            scale = abs(analytic) + (_rms(gradient) + floor) * float(np.linalg.norm(d)) + 1e-300
            errors[name] = max(errors[name], abs(numeric - analytic) / scale)
    group.check(errors, tolerance, f"{type(module).__name__}: backward differs from central differences")
    return errors


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
    group = _Group(parallel.tp, array_module(_leaves(x)[0]))
    serial, sharded = build(TensorParallel(cursor=parallel.cursor)), build(parallel)
    wholes = {p.name: p for p in prepare(serial, seed, group.xp)}
    shards = {p.name: p for p in prepare(sharded, seed, group.xp)}
    shapes = [{name: p.shape for name, p in some.items()} for some in (wholes, shards)]
    group.agree("" if shapes[0] == shapes[1] else f"parameters differ: serial {shapes[0]}, here {shapes[1]}")
    assert_owned_once(list(shards.values()), parallel.tp)

    y, saved = serial.forward(x)
    dys = [group.xp.asarray(draw(leaf.shape, "I", parallel.tp, seed + i)) for i, leaf in enumerate(_leaves(y), 1)]
    dy = tuple(dys) if isinstance(y, tuple) else dys[0]
    dx = serial.backward(dy, saved, wgrad.now)
    y_here, saved = sharded.forward(cut_x(x, parallel))
    dx_here = sharded.backward(cut_y(dy, parallel), saved, wgrad.now)

    pairs = {"output": [(y_here, cut_y(y, parallel), y)]}
    pairs["input"] = [] if dx is None else [(dx_here, cut_x(dx, parallel), dx)]
    for name, p in shards.items():
        pairs[name] = [(complete(p, parallel.tp), wholes[name].grad[p.index], wholes[name].grad)]
    differences, sizes = {}, {}
    for name, triples in pairs.items():
        leaves = [item for triple in triples for item in zip(*map(_leaves, triple), strict=True)]
        wrong = next((f"{a.shape}, not {b.shape}" for a, b, _ in leaves if a.shape != b.shape), "")
        group.agree(wrong and f"{type(serial).__name__}: {name} has shape {wrong}")
        worst = [float(np.abs(to_host(a) - to_host(b)).max(initial=0)) for a, b, _ in leaves]
        differences[name] = group.most(max(worst, default=0.0))
        sizes[name] = max((float(np.abs(to_host(whole)).max(initial=0)) for *_, whole in leaves), default=0.0)
    floor = 1e-3 * max(sizes.values())
    errors = {name: difference / max(sizes[name], floor, 1e-300) for name, difference in differences.items()}
    group.check(errors, tolerance, f"{type(serial).__name__} on {parallel.tp.size} ranks differs from serial")
    return errors


def prepare(module: Module, seed: int = 0, xp: ModuleType = np) -> list[Parameter]:
    """Float64 parameters at a general point: initial values plus N(0, 0.1^2), by name and global index, zero gradients.

    (At its initial value a bias is zero and a norm's weight one, where many an error does not show.)
    """
    parameters = module.initialise(seed, np.float64, xp)
    for p in parameters:
        if p.data.dtype != np.float64:
            raise TypeError(f"{p.name} is {p.data.dtype}; the check needs float64: pass a module without arrays")
        p.data += 0.1 * random.normal_slab(random.key(seed, "prepare", p.name), p.shape, p.index, xp)
    return parameters


def complete(p: Parameter, comm: Communicator) -> Host:
    """The gradient of this rank's shard after the sum that it owes: over all shards, at each number of the whole."""
    grad = to_host(p.grad)
    if not p.shared:
        return grad
    whole = np.zeros(p.shape)
    whole[p.index] = grad
    return _Group(comm, array_module(p.grad)).reduce(whole)[p.index]


def assert_owned_once(parameters: list[Parameter], comm: Communicator) -> None:
    """Over the ranks of ``comm`` the owned parts lie inside the shards, and tile every parameter exactly once."""
    for p in parameters:
        group, count = _Group(comm, array_module(p.data)), np.zeros(p.shape)
        count[p.owned] = 1
        empty = not count.any()
        inside = empty or all(s.start <= o.start and o.stop <= s.stop for o, s in zip(p.owned, p.index, strict=True))
        group.agree("" if inside else f"{p.name}: owned {p.owned} is not inside index {p.index}")
        count = group.reduce(count)
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


@dataclass(frozen=True)
class _Group:
    """Host numbers over the ranks of a communicator, carried in arrays of the library ``xp``."""

    comm: Communicator
    xp: ModuleType

    def gather(self, value: float) -> Host:
        return to_host(self.comm.all_gather(self.xp.asarray([float(value)])).wait())

    def reduce(self, x: Host, op: Op = "sum") -> Host:
        return to_host(self.comm.all_reduce(self.xp.asarray(x), op).wait())

    def most(self, value: float) -> float:
        """The largest on any rank; nan if any is."""
        return float(self.gather(value).max())

    def agree(self, problem: str) -> None:
        """Raise on every rank, with the words of the first rank that has a problem, if any has one."""
        words = problem.encode()
        sizes = self.gather(len(words)).astype(int)
        if not sizes.any():
            return
        first = int(sizes.argmax() if not (sizes > 0).any() else np.flatnonzero(sizes)[0])
        text = np.frombuffer(words if self.comm.rank == first else bytes(sizes[first]), np.uint8)
        said = to_host(self.comm.broadcast(self.xp.asarray(text), first).wait()).tobytes().decode()
        raise AssertionError(said if self.comm.size == 1 else f"{said} (rank {first} of {self.comm.size})")

    def check(self, errors: dict[str, float], tolerance: float, message: str) -> None:
        wrong = {name: error for name, error in errors.items() if not error <= tolerance}
        listed = ", ".join(f"{name}: {error:.1e}" for name, error in wrong.items())
        self.agree(f"{message}: {listed} (at most {tolerance:g})" if wrong else "")


def _leaves(value: Any) -> list[Array]:
    """The arrays of a tuple, an array or None."""
    if value is None:
        return []
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, tuple) else [value]


def _copy(value: Any) -> Any:
    return tuple(_copy(item) for item in value) if isinstance(value, tuple) else value.copy()


def _square(x: Array) -> float:
    return float(np.square(to_host(x), dtype=np.float64).sum())


def _rms(x: Host) -> float:
    return math.sqrt(_square(x) / max(1, x.size))


def _directions(n: int, elementwise: int, seed: int) -> list[Host]:
    return list(np.eye(n)) if n <= elementwise else list(np.random.default_rng((seed, n)).standard_normal((2, n)))


def _places(shape: tuple[int, ...], layout: str, group: _Group) -> tuple[Host, Host, int]:
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


def _whole(name: str, local: Host, places: Host, counted: Host, n: int, group: _Group) -> tuple[Host, Host]:
    """The flat whole of a gradient of which ranks hold parts, the same wherever they overlap; and ``places``."""
    group.agree("" if local.shape == places.shape else f"{name}: gradient of shape {local.shape}, not {places.shape}")
    flat = np.zeros(n)
    flat[places[counted]] = local[counted]
    flat = group.reduce(flat)
    worst = float(np.abs(flat[places] - local).max(initial=0))
    group.agree("" if worst <= 1e-9 * (1 + np.abs(flat).max(initial=0)) else f"{name}: gradients differ between ranks")
    return flat, places
