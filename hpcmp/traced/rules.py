"""The derivative of every function that ``Traced`` follows.

For y = f(a, b), ``RULES[f](y, a, b)`` is the pair of pullbacks (dy -> (df/da)^T dy, dy -> (df/db)^T dy), or one
pullback where only the first operand is differentiated; None stands for an operand that is not. Operands and dy are
plain arrays; for a list of operands there is a list of pullbacks.

A pullback keeps alive the arrays that it names and no others: that is the memory which a forward holds. It may return
its result still broadcast, and in any float dtype: the tape sums it to the operand's shape and casts it. A rule's
parameters are those of its function; a call with one that the rule does not name is refused.

RULES is open: ``RULES[scipy.special.erf] = lambda y, x: lambda dy: dy * 2 / np.pi**0.5 * np.exp(-x * x)``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays import Array
from . import linear
from .shapes import Pullback, along, astype, count, join, kept, scatter, spread, taken, to_shape


def power(y: Array, a: Array, b: Array) -> tuple[Pullback, Pullback]:
    """a^b; da = b a^(b-1) dy, which is 0 for b = 0 even where a = 0; db = y log(a) dy, which is 0 where a = 0."""

    def da(dy: Array) -> Array:
        scalar: bool = np.isscalar(b)  # stays one, so that it does not widen float32 arrays
        less = (b - 1 if b else 1) if scalar else np.where(b == 0, 1, b - 1)
        return dy * (b * a**less)

    return da, lambda dy: dy * y * np.log(np.where(a == 0, 1, a))


def winner(wins: Callable[[Array, Array], Array]) -> Callable[..., tuple[Pullback, Pullback]]:
    """Maximum or minimum of two arrays: dy goes to the operand that ``wins``, half to each where they are equal."""

    def share(mine: Array, other: Array) -> Pullback:
        return lambda dy: np.where(mine == other, dy / 2, np.where(wins(mine, other), dy, 0))

    return lambda y, a, b: (share(a, b), share(b, a))


def extremum(y: Array, x: Array, axis: Any = None, *, keepdims: bool = False) -> Pullback:
    """Maximum or minimum over axes: dy is shared equally between the elements that attain it."""
    column = kept(x.shape, axis)
    attains = x == y.reshape(column)
    return lambda dy: attains * (dy.reshape(column) / attains.sum(axis=axis, keepdims=True, dtype=dy.dtype))


def variance(
    y: Array, x: Array, axis: Any = None, dtype: Any = None, *, ddof: float = 0, keepdims: bool = False
) -> Pullback:
    """y = sum (x - m)^2 / (n - ddof) with the mean m: dx = 2 (x - m) dy / (n - ddof)."""
    column, n = kept(x.shape, axis), count(x.shape, axis)
    return lambda dy: 2 * dy.reshape(column) * (x - x.mean(axis=axis, keepdims=True)) / (n - ddof)


def deviation(
    y: Array, x: Array, axis: Any = None, dtype: Any = None, *, ddof: float = 0, keepdims: bool = False
) -> Pullback:
    """The root of the variance: dx = (x - m) dy / ((n - ddof) y)."""
    of_variance = variance(y, x, axis, ddof=ddof)
    return lambda dy: of_variance(dy / (2 * y))


def cumulative(y: Array, x: Array, axis: int | None = None, dtype: Any = None) -> Pullback:
    """y_i = sum_{j <= i} x_j: dx_j = sum_{i >= j} dy_i. Without an axis, over the flattened array."""
    along_axis, shape = axis or 0, x.shape
    return lambda dy: np.flip(np.cumsum(np.flip(dy, along_axis), along_axis), along_axis).reshape(shape)


def masked(mask: Array) -> Pullback:
    """dy where the mask holds, 0 elsewhere (which a product would not give for an infinite dy)."""
    return lambda dy: np.where(mask, dy, 0)


def same(dy: Array) -> Array:
    """The pullback of everything that only copies, casts or broadcasts."""
    return dy


RULES: dict[Any, Callable[..., Any]] = {
    # elementwise, one operand
    np.positive: lambda y, x: same,
    np.negative: lambda y, x: np.negative,
    np.absolute: lambda y, x: lambda dy: dy * np.sign(x),
    np.square: lambda y, x: lambda dy: dy * (2 * x),
    np.sqrt: lambda y, x: lambda dy: dy / (2 * y),
    np.reciprocal: lambda y, x: lambda dy: -dy * y * y,
    np.exp: lambda y, x: lambda dy: dy * y,
    np.expm1: lambda y, x: lambda dy: dy * (y + 1),
    np.log: lambda y, x: lambda dy: dy / x,
    np.log1p: lambda y, x: lambda dy: dy / (1 + x),
    np.tanh: lambda y, x: lambda dy: dy * (1 - y * y),
    np.sin: lambda y, x: lambda dy: dy * np.cos(x),
    np.cos: lambda y, x: lambda dy: -dy * np.sin(x),
    np.clip: lambda y, x, a_min=None, a_max=None, *, min=None, max=None: masked(x == y),
    astype: lambda y, x, dtype: same,
    np.copy: lambda y, x: same,
    # elementwise, two operands
    np.add: lambda y, a, b: (same, same),
    np.subtract: lambda y, a, b: (same, np.negative),
    np.multiply: lambda y, a, b: (lambda dy: dy * b, lambda dy: dy * a),
    np.divide: lambda y, a, b: (lambda dy: dy / b, lambda dy: -dy * y / b),
    np.power: power,
    np.maximum: winner(operator.gt),
    np.minimum: winner(operator.lt),
    np.logaddexp: lambda y, a, b: (lambda dy: dy * np.exp(a - y), lambda dy: dy * np.exp(b - y)),
    np.where: lambda y, c, a, b: (None, masked(c), lambda dy: np.where(c, 0, dy)),
    # products
    np.matmul: linear.matmul,
    np.einsum: linear.einsum,
    # reductions
    np.sum: lambda y, x, axis=None, dtype=None, *, keepdims=False: spread(x.shape, axis),
    np.mean: lambda y, x, axis=None, dtype=None, *, keepdims=False: spread(x.shape, axis, count(x.shape, axis)),
    np.max: extremum,
    np.min: extremum,
    np.var: variance,
    np.std: deviation,
    np.cumsum: cumulative,
    # shapes
    np.reshape: lambda y, x, shape: to_shape(x.shape),
    np.ravel: lambda y, x: to_shape(x.shape),
    np.squeeze: lambda y, x, axis=None: to_shape(x.shape),
    np.expand_dims: lambda y, x, axis: to_shape(x.shape),
    np.broadcast_to: lambda y, x, shape: same,
    np.transpose: lambda y, x, axes=None: (
        lambda dy: np.transpose(dy, axes and np.argsort([axis % len(axes) for axis in axes]).tolist())
    ),
    np.swapaxes: lambda y, x, axis1, axis2: lambda dy: np.swapaxes(dy, axis1, axis2),
    np.moveaxis: lambda y, x, source, destination: lambda dy: np.moveaxis(dy, destination, source),
    np.flip: lambda y, x, axis=None: lambda dy: np.flip(dy, axis),
    np.tril: lambda y, x, k=0: lambda dy: np.tril(dy, k),
    np.triu: lambda y, x, k=0: lambda dy: np.triu(dy, k),
    np.concatenate: join,
    np.stack: lambda y, xs, axis=0: ([lambda dy, i=i: np.moveaxis(dy, axis, 0)[i] for i in range(len(xs))],),
    # elements
    operator.getitem: lambda y, x, key: scatter(x.shape, key),
    np.take: lambda y, x, indices, axis=None: scatter(x.shape, taken(x.shape, indices, axis)),
    np.take_along_axis: lambda y, x, indices, axis=-1: scatter(x.shape, along(x.shape, indices, axis)),
}
RULES |= {operator.pow: power, np.amax: extremum, np.amin: extremum}

#: Functions whose derivative is zero wherever there is one: they take the plain arrays and give plain arrays.
CONSTANT: set[Any] = {
    *(np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal),
    *(np.logical_and, np.logical_or, np.logical_xor, np.logical_not, np.any, np.all),
    *(np.isnan, np.isinf, np.isfinite, np.signbit, np.sign, np.floor, np.ceil, np.rint, np.trunc),
    *(np.argmax, np.argmin, np.argsort, np.shape, np.ndim, np.size, np.zeros_like, np.ones_like, np.empty_like),
}
