"""The specification of the optimizers' kernels, as ``reference`` is of the others': flat arrays, in place.

Every function takes g = grad_scale * grad for its gradient. Arrays are of one dtype, float32 or float64. grad_scale (of
``descend``: rate) is a number, or an array of one, float64, where the others are: on a GPU the kernel reads it then,
and the host waits for nothing. Where it is NaN nothing changes, and a direction that is asked for is zero.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

from ..arrays import Array, array_module, to_host

_NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315


def clip_factor(sums: Array, factor: Array, *, clip: float | None, scale: float) -> None:
    """factor = min(1, clip / norm) / scale, norm = sqrt(sums[0]) / scale, in place: what a step multiplies its gradient
    by, from the sum of squares of the gradient, which is ``scale`` times too large; clip: None for no limit.

    NaN if the norm or the loss, sums[1], is not finite, and if it was NaN before: after a step that is no good every
    further one changes nothing, until the host has seen it. sums (2 or more,), factor (1,), float64, in one place.
    """
    xp = array_module(sums)
    norm = xp.sqrt(sums[:1]) / scale
    clipped = 1.0 if clip is None else clip / xp.maximum(norm, clip)
    sound = xp.isfinite(norm) & xp.isfinite(sums[1:2]) & ~xp.isnan(factor)
    factor[...] = xp.where(sound, clipped / scale, math.nan)


def adamw(
    data: Array, grad: Array, m: Array, v: Array, *, step: int, rate: float, betas: tuple[float, float], epsilon: float,
    decay: float, grad_scale: float | Array, out: Array | None = None,
) -> None:  # fmt: skip
    """One step of AdamW. out: what gets the new weights besides, in its own dtype.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,
    data <- data - rate (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + epsilon) + decay data)

    Loshchilov and Hutter, "Decoupled weight decay regularization", 2019, algorithm 2.
    """
    scale = _number(grad_scale)
    if math.isnan(scale):
        return
    update = adam_update(grad, m, v, step=step, betas=betas, epsilon=epsilon, grad_scale=scale)
    data -= rate * (update + decay * data)
    if out is not None:
        out[...] = data


def adam_update(
    grad: Array, m: Array, v: Array, *, step: int, betas: tuple[float, float], epsilon: float, grad_scale: float | Array
) -> Array:
    """The direction of Adam, before the learning rate; the moments move on. Kingma and Ba, 2015, algorithm 1."""
    xp, scale = array_module(grad), _number(grad_scale)
    if math.isnan(scale):
        return xp.zeros_like(grad)
    b1, b2 = betas
    g = grad * grad.dtype.type(scale)
    m *= b1
    m += (1 - b1) * g
    v *= b2
    v += (1 - b2) * g * g
    return m / (1 - b1**step) / (xp.sqrt(v / (1 - b2**step)) + epsilon)


def sgd(
    data: Array, grad: Array, m: Array, *, rate: float, momentum: float, decay: float, grad_scale: float | Array
) -> None:
    """One step of gradient descent with momentum: m <- momentum m + g, data <- data - rate (m + decay data).

    Polyak, 1964; the decay is decoupled, as in Loshchilov and Hutter, 2019, algorithm 1.
    """
    scale = _number(grad_scale)
    if math.isnan(scale):
        return
    m *= momentum
    m += grad * grad.dtype.type(scale)
    data -= rate * (m + decay * data)


def nesterov(grad: Array, m: Array, *, momentum: float, grad_scale: float | Array) -> Array:
    """m <- momentum m + g; g + momentum m: the gradient as it would be a step further on. Nesterov, 1983."""
    scale = _number(grad_scale)
    if math.isnan(scale):
        return array_module(grad).zeros_like(grad)
    g = grad * grad.dtype.type(scale)
    m *= momentum
    m += g
    return g + momentum * m


def descend(data: Array, direction: Array, *, rate: float | Array, decay: float) -> None:
    """data <- data - rate (direction + decay data)."""
    number = _number(rate)
    if not math.isnan(number):
        data -= data.dtype.type(number) * (direction + decay * data)


def orthogonalise(
    x: Array, steps: int = 5, epsilon: float = 1e-7, multiply: Callable[[Array, Array], Array] = operator.matmul
) -> Array:
    """About U V^T of x = U S V^T, (rows, columns): every singular value brought near 1, between 0.7 and 1.2.

    With A = X X^T:  X <- a X + (b A + c A A) X, ``steps`` times, from X = x / |x|. Jordan et al., "Muon", 2024.
    """
    xp = array_module(x)
    a, b, c = _NEWTON_SCHULZ
    wide = x if x.shape[0] <= x.shape[1] else x.T
    norm = xp.sqrt(xp.square(wide, dtype="float64").sum()) + epsilon
    y = wide / norm.astype(x.dtype)  # on a GPU the host does not wait for it
    for _ in range(steps):
        gram = multiply(y, y.T)
        y = a * y + multiply(b * gram + c * multiply(gram, gram), y)
    return y if x.shape[0] <= x.shape[1] else y.T


def _number(x: float | Array) -> float:
    return float(to_host(x).item())
