"""The adjoint test of a collective."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
from numpy.typing import DTypeLike

from ..arrays import Array, array_module, to_host
from ..collectives import Collective
from ..comm.base import Communicator
from .group import Group, draw, square


def inner(a: Array, b: Array, layout: str, comm: Communicator) -> float:
    """<a, b> in float64; an invariant pair is counted once. Raises on every rank if ranks disagree about that one."""
    local = float(np.vdot(to_host(a).astype(np.float64), to_host(b).astype(np.float64)))
    everyone = Group(comm, array_module(a)).gather(local)
    if layout != "I":
        return float(everyone.sum())
    size = math.sqrt(max(square(a), 1e-300) * max(square(b), 1e-300))
    spread = float(np.ptp(everyone))
    Group(comm, array_module(a)).agree(
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
    group = Group(op.comm, xp)
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
    scale = math.sqrt(sum(group.gather(square(ax))) * sum(group.gather(square(y))))
    limit = (50 * float(np.finfo(dtype).eps) if tolerance is None else tolerance) * scale
    group.agree(
        "" if abs(left - right) <= limit else f"{name}: <A x, y> = {left!r}, but <x, A^T y> = {right!r} with A^T {back}"
    )
