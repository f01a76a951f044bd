"""Optimizers' steps and the norm of a gradient: each array is read and written once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import update as specification
from ..threads import share
from .jit import jit

Floats = NDArray[np.floating]

_PIECE = 1 << 14  # numbers added up in one go, whatever the number of threads


def _plain(*arrays: Floats) -> bool:
    return all(x.flags.c_contiguous and x.ndim == 1 for x in arrays)


def adamw(
    data: Floats, grad: Floats, m: Floats, v: Floats, *, out: NDArray[Any] | None = None, **settings: Any
) -> None:
    """See ``update.adamw``."""
    if not _plain(data, grad, m, v):
        specification.adamw(data, grad, m, v, out=out, **settings)
        return
    rate, decay, scale = settings.pop("rate"), settings.pop("decay"), np.asarray(settings.pop("grad_scale")).item()
    if math.isnan(scale):
        return
    numbers = _adam(data.dtype, **settings, grad_scale=scale)
    last = data.dtype.type(rate), data.dtype.type(decay)
    share(data.size, data.size, lambda a, b: _adamw(data[a:b], grad[a:b], m[a:b], v[a:b], *numbers, *last))
    if out is not None:
        out[...] = data


def adam_update(grad: Floats, m: Floats, v: Floats, **settings: Any) -> Floats:
    """See ``update.adam_update``."""
    if not _plain(grad, m, v):
        found: Floats = specification.adam_update(grad, m, v, **settings)
        return found
    scale = np.asarray(settings.pop("grad_scale")).item()
    if math.isnan(scale):
        return np.zeros_like(grad)
    out, numbers = np.empty_like(grad), _adam(grad.dtype, **settings, grad_scale=scale)
    share(grad.size, grad.size, lambda a, b: _adam_update(grad[a:b], m[a:b], v[a:b], out[a:b], *numbers))
    return out


def _adam(
    dtype: np.dtype[Any], *, step: int, betas: tuple[float, float], epsilon: float, grad_scale: float
) -> tuple[Any, ...]:
    """b1, 1 - b1, b2, 1 - b2, 1 / (1 - b1^t), 1 / (1 - b2^t), epsilon and the scale of the gradient, of a dtype."""
    b1, b2 = betas
    numbers = (b1, 1 - b1, b2, 1 - b2, 1 / (1 - b1**step), 1 / (1 - b2**step), epsilon, grad_scale)
    return tuple(dtype.type(x) for x in numbers)


def sgd(data: Floats, grad: Floats, m: Floats, **settings: Any) -> None:
    """See ``update.sgd``."""
    if not _plain(data, grad, m):
        specification.sgd(data, grad, m, **settings)
        return
    settings["grad_scale"] = np.asarray(settings["grad_scale"]).item()
    if math.isnan(settings["grad_scale"]):
        return
    numbers = [data.dtype.type(settings[key]) for key in ("rate", "momentum", "decay", "grad_scale")]
    share(data.size, data.size, lambda a, b: _sgd(data[a:b], grad[a:b], m[a:b], *numbers))


def square_sum(x: Floats) -> float:
    """See ``reference.square_sum``."""
    flat = np.ascontiguousarray(x).reshape(-1)
    sums = np.empty(-(-flat.size // _PIECE))
    share(len(sums), flat.size, lambda a, b: _square_sum(flat[a * _PIECE : b * _PIECE], sums[a:b]))
    return float(sums.sum())


@jit
def _adamw(
    data: Floats, grad: Floats, m: Floats, v: Floats, b1: Any, c1: Any, b2: Any, c2: Any, r1: Any, r2: Any,
    epsilon: Any, scale: Any, rate: Any, decay: Any,
) -> None:  # fmt: skip
    for i in range(data.size):
        g = grad[i] * scale
        first, second = b1 * m[i] + c1 * g, b2 * v[i] + c2 * g * g
        data[i] -= rate * (first * r1 / (np.sqrt(second * r2) + epsilon) + decay * data[i])
        m[i], v[i] = first, second


@jit
def _adam_update(
    grad: Floats, m: Floats, v: Floats, out: Floats, b1: Any, c1: Any, b2: Any, c2: Any, r1: Any, r2: Any,
    epsilon: Any, scale: Any,
) -> None:  # fmt: skip
    for i in range(grad.size):
        g = grad[i] * scale
        first, second = b1 * m[i] + c1 * g, b2 * v[i] + c2 * g * g
        out[i] = first * r1 / (np.sqrt(second * r2) + epsilon)
        m[i], v[i] = first, second


@jit
def _sgd(data: Floats, grad: Floats, m: Floats, rate: Any, momentum: Any, decay: Any, scale: Any) -> None:
    for i in range(data.size):
        m[i] = momentum * m[i] + grad[i] * scale
        data[i] -= rate * (m[i] + decay * data[i])


@jit
def _square_sum(x: Floats, sums: NDArray[np.float64]) -> None:
    for p in range(sums.size):
        piece = x[p * _PIECE : (p + 1) * _PIECE]
        total = 0.0
        for i in range(piece.size):
            wide = np.float64(piece[i])
            total += wide * wide
        sums[p] = total
