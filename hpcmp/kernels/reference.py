"""Every kernel, plainly, in NumPy-API code: the specification. Runs on NumPy and CuPy arrays.

Shapes: s sequence, b batch, h hidden, n query heads, k key-value heads, d head size, f feed-forward width, v vocabulary
rows; a leading ``...`` is any shape. Every result has the dtype of its first argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..arrays import Array, array_module
from ..random import DropoutMask

_GELU_A, _GELU_C = math.sqrt(2 / math.pi), 0.044715


def rows(x: Array) -> Array:
    """``x`` (..., n) as a matrix; any size may be zero."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def matmul(x: Array, w: Array, bias: Array | None = None) -> Array:
    """y = x w, or x w + bias. x (..., i), w (i, o), bias (o,), y (..., o)."""
    y = rows(x) @ w
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], w.shape[1])


def matmul_transposed(dy: Array, w: Array) -> Array:
    """dx = dy w^T. dy (..., o), w (i, o), dx (..., i)."""
    return matmul(dy, w.T)


def add_outer(grad: Array, x: Array, dy: Array) -> None:
    """grad += x^T dy, in place: the gradient of ``matmul`` with respect to w."""
    grad += rows(x).T @ rows(dy)


def add_rows(grad: Array, dy: Array) -> None:
    """grad += the sum of the rows of dy, in place: the gradient of ``matmul`` with respect to its bias.

    grad (o,), dy (..., o).
    """
    grad += rows(dy).sum(0, dtype=grad.dtype)


def gelu(x: Array) -> Array:
    """y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))). Hendrycks and Gimpel, 2016, the tanh form that GPT-2 uses."""
    xp = array_module(x)
    return 0.5 * x * (1 + xp.tanh(_GELU_A * x * (1 + _GELU_C * x * x)))


def gelu_backward(dy: Array, x: Array) -> Array:
    """dx = dy/2 (1 + t + x (1 - t^2) sqrt(2/pi) (1 + 3 * 0.044715 x^2)), t the tanh of the forward."""
    xp = array_module(x)
    t = xp.tanh(_GELU_A * x * (1 + _GELU_C * x * x))
    return 0.5 * dy * (1 + t + x * (1 - t * t) * _GELU_A * (1 + 3 * _GELU_C * x * x))


def swiglu(x: Array) -> Array:
    """y = g sigmoid(g) u. x (..., 2, f) holds gate g and up u; y (..., f). Shazeer, "GLU variants", 2020."""
    gate, up = x[..., 0, :], x[..., 1, :]
    return gate * _sigmoid(gate) * up


def swiglu_backward(dy: Array, x: Array) -> Array:
    """dg = dy u s (1 + g (1 - s)), du = dy g s, with s = sigmoid(g); stacked as x is."""
    xp = array_module(x)
    gate, up = x[..., 0, :], x[..., 1, :]
    s = _sigmoid(gate)
    return xp.stack([dy * up * s * (1 + gate * (1 - s)), dy * gate * s], -2)


def _sigmoid(x: Array) -> Array:
    xp = array_module(x)
    return 1 / (1 + xp.exp(xp.minimum(-x, 80)))  # beyond 80 it is 0 but for 1e-35, and exp would overflow in float32


def _means(*xs: Array) -> list[Array]:
    return [x.mean(-1, keepdims=True) for x in xs]


def layer_norm(
    x: Array, weight: Array, bias: Array, epsilon: float, means: Callable[..., list[Array]] = _means
) -> tuple[Array, Array, Array]:
    """y = (x - mean) r w + b, r = 1/sqrt(var + epsilon), over the last axis; (y, mean, r). Ba, Kiros, Hinton, 2016.

    means, here and below: makes the mean over the last axis, kept with length 1, of each of some arrays like x; where x
    is a shard of the last axis, that over the whole of it.
    """
    xp = array_module(x)
    (mean,) = means(x)
    centred = x - mean
    (variance,) = means(centred * centred)
    rstd = 1 / xp.sqrt(variance + epsilon)
    return centred * rstd * weight + bias, mean, rstd


def layer_norm_backward(
    dy: Array,
    x: Array,
    weight: Array,
    mean: Array,
    rstd: Array,
    means: Callable[..., list[Array]] = _means,
    onto: Array | None = None,
) -> Array:
    """dx = r (g - mean(g) - z mean(g z)), g = dy w, z = (x - mean) r; with ``onto``, onto + dx, as a residual needs."""
    normalised = (x - mean) * rstd
    g = dy * weight
    first, second = means(g, g * normalised)
    dx = rstd * (g - first - normalised * second)
    return dx if onto is None else onto + dx


def layer_norm_backward_weight(dy: Array, x: Array, mean: Array, rstd: Array) -> tuple[Array, Array]:
    """dw = sum dy z, db = sum dy, over all axes but the last."""
    axes = tuple(range(dy.ndim - 1))
    return (dy * ((x - mean) * rstd)).sum(axes), dy.sum(axes)


def rms_norm(
    x: Array, weight: Array, epsilon: float, means: Callable[..., list[Array]] = _means
) -> tuple[Array, Array]:
    """y = x r w, r = 1/sqrt(mean(x^2) + epsilon), over the last axis; (y, r). Zhang and Sennrich, 2019."""
    xp = array_module(x)
    (square,) = means(x * x)
    rstd = 1 / xp.sqrt(square + epsilon)
    return x * rstd * weight, rstd


def rms_norm_backward(
    dy: Array,
    x: Array,
    weight: Array,
    rstd: Array,
    means: Callable[..., list[Array]] = _means,
    onto: Array | None = None,
) -> Array:
    """dx = r (g - z mean(g z)), g = dy w, z = x r; with ``onto``, onto + dx, as a residual needs."""
    normalised = x * rstd
    g = dy * weight
    (mean,) = means(g * normalised)
    dx = rstd * (g - normalised * mean)
    return dx if onto is None else onto + dx


def rms_norm_backward_weight(dy: Array, x: Array, rstd: Array) -> Array:
    """dw = sum dy z, over all axes but the last."""
    return (dy * (x * rstd)).sum(tuple(range(dy.ndim - 1)))


def add(x: Array, y: Array) -> Array:
    """x + y, of one shape."""
    return x + y


def dropout(x: Array, mask: DropoutMask, onto: Array | None = None) -> Array:
    """y = x keep / (1 - rate), the mask's rows x's but for the last axis; with ``onto``, onto + y. Its own adjoint."""
    y = x * mask.scaled(x.dtype, array_module(x))
    return y if onto is None else onto + y


def rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the pairs (x_i, x_{i + d/2}) by the angle of their position: (a cos - b sin, b cos + a sin). **Written
    over x**; returns x.

    x (s, b, n, D), cos and sin (s, 1, 1, d/2): the first d numbers turn, the other D - d are left alone (the values
    beside a head's keys). The adjoint is the rotation by the opposite angle, ``sin`` negated. Su et al., "RoFormer",
    2021, with the halves paired as Llama has them.
    """
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    a[...], b[...] = a * cos - b * sin, b * cos + a * sin
    return x


def embedding(table: Array, ids: Array, first: int) -> Array:
    """y = table[ids - first], zero where the row lies elsewhere. table (rows, h), ids (...), y (..., h)."""
    xp = array_module(table)
    row = ids - first
    here = (row >= 0) & (row < table.shape[0])
    if table.shape[0] == 0:
        return xp.zeros((*ids.shape, table.shape[1]), table.dtype)
    y = table[xp.where(here, row, 0)]
    y[~here] = 0
    return y


def embedding_backward_weight(grad: Array, ids: Array, first: int, dy: Array) -> None:
    """grad[ids - first] += dy, in place, for the rows that are here."""
    xp = array_module(grad)
    row = (ids - first).reshape(-1)
    here = (row >= 0) & (row < grad.shape[0])
    xp.add.at(grad, row[here], rows(dy)[here])


def cross_entropy_parts(logits: Array, targets: Array, first: int) -> tuple[Array, Array, Array]:
    """(m, sum_j exp(x_j - m), x_target or zero if the target's column lies elsewhere), m the largest of a row.

    logits (..., v), which may be a shard of the vocabulary from the column ``first`` on: of no columns the parts are
    (-inf, 0, 0).
    """
    xp = array_module(logits)
    if logits.shape[-1] == 0:
        zero = xp.zeros(targets.shape, logits.dtype)
        return zero - xp.inf, zero, zero
    top = logits.max(-1)
    shift = xp.where(top == -xp.inf, 0, top).astype(logits.dtype)  # else exp(-inf + inf)
    column = targets - first
    here = (column >= 0) & (column < logits.shape[-1])
    chosen = xp.take_along_axis(logits, xp.where(here, column, 0)[..., None], -1)[..., 0]
    total = xp.exp(logits - shift[..., None]).sum(-1)
    return top, total, xp.where(here, chosen, 0).astype(logits.dtype)


def cross_entropy_backward(scale: Array, logits: Array, targets: Array, first: int, lse: Array) -> Array:
    """dx = scale (exp(x - lse) - [column is the target]), **written over the logits**; returns these.

    scale and lse (...): a zero scale ignores a position.
    """
    xp = array_module(logits)
    logits -= lse[..., None]
    xp.exp(logits, out=logits)
    column = targets - first
    chosen = xp.nonzero((column >= 0) & (column < logits.shape[-1]))
    logits[(*chosen, column[chosen])] -= 1
    logits *= scale[..., None]
    return logits


def square_sum(x: Array) -> float:
    """sum x^2, accumulated in float64."""
    xp = array_module(x)
    return float(xp.square(x, dtype="float64").sum()) if x.size else 0.0


def add_square_sum(total: Array, x: Array) -> None:
    """total += sum x^2, accumulated in float64, in place. total (1,), float64, where x is: nothing waits for it."""
    total += array_module(x).square(x, dtype="float64").sum()


def assign(target: Array, x: Array) -> None:
    """target = x, of one shape and any two dtypes, in place, rounded once."""
    target[...] = x
