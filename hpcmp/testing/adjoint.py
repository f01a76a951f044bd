"""The adjoint test of a collective."""

from __future__ import annotations

from types import ModuleType

import numpy as np
from numpy.typing import DTypeLike

from ..arrays import Array, array_module
from ..collectives import Collective
from ..comm.base import Communicator
from .group import Group, Host, dot, draw


def inner(a: Array, b: Array, layout: str, comm: Communicator) -> float:
    """<a, b> in float64; an invariant pair is counted once, and asserted to be the same on every rank."""
    return _counted(Group(comm, array_module(a)).gather([dot(a, b)])[:, 0], layout)


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

    shape: of x on this rank; it may differ between ranks where the layout varies. tolerance: of the difference,
    relative to ||A x|| ||y|| (100 units of rounding, by default). Also asserts that both results keep the dtype, that
    A^T y is shaped as x, that x and y are left as they were, and that (A^T)^T is A's own kind.
    """
    source, target = op.layout[0], op.layout[1]
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
    # One message: nan stands for a problem, whose words are then agreed on.
    products = [] if problem else [dot(ax, y), dot(x, aty), dot(ax, ax), dot(y, y)]
    numbers = group.gather([*products, *[np.nan] * (4 - len(products))])
    if np.isnan(numbers).any():
        group.agree(problem)
    left, right = _counted(numbers[:, 0], target), _counted(numbers[:, 1], source)
    scale = float(np.sqrt(numbers[:, 2].sum() * numbers[:, 3].sum()))
    if not abs(left - right) <= (100 * float(np.finfo(dtype).eps) if tolerance is None else tolerance) * scale:
        raise AssertionError(f"{name}: <A x, y> = {left!r}, but <x, A^T y> = {right!r} with {back} as A^T")


def _counted(local: Host, layout: str) -> float:
    """The sum over the ranks of a varying array's inner products, or the one that an invariant array has everywhere."""
    if layout != "I":
        return float(local.sum())
    if not np.ptp(local) <= 1e-4 * np.abs(local).max():
        raise AssertionError(f"an array that should be invariant differs between ranks: inner products {local}")
    return float(local[0])
