"""Optimizers' steps over flat arrays: each is read and written once. float32 and float64."""

from __future__ import annotations

import math
from typing import Any

from ...arrays import Array, array_module
from .. import update as specification
from .grid import PACK, contiguous
from .launch import FLOATS, declare, launch

_THREADS = 256  # of a block (update.cu)
_MASTERS = "float", "double"

declare(
    "update",
    {
        "clip_factor": [()],
        "adamw": [(w, t) for w in _MASTERS for t in FLOATS],
        "adam_update": _MASTERS,
        "sgd": _MASTERS,
        "nesterov": _MASTERS,
        "descend": _MASTERS,
    },
)


def clip_factor(sums: Array, factor: Array, *, clip: float | None, scale: float) -> None:
    """See ``update.clip_factor``."""
    limit = math.inf if clip is None else float(clip)
    launch("update", "clip_factor", (), (1,), (1,), contiguous(sums), factor, limit, float(scale), math.nan)


def adamw(
    data: Array,
    grad: Array,
    m: Array,
    v: Array,
    *,
    rate: float,
    decay: float,
    grad_scale: float | Array,
    out: Array | None = None,
    **settings: Any,
) -> None:
    """See ``update.adamw``."""
    if not _plain(data, grad, m, v, *([] if out is None else [out])):
        specification.adamw(data, grad, m, v, rate=rate, decay=decay, grad_scale=grad_scale, out=out, **settings)
        return
    numbers = *_adam(**settings), *_number(grad_scale), float(rate), float(decay)
    types = data.dtype, data.dtype if out is None else out.dtype
    launch("update", "adamw", types, _grid(data), (_THREADS,), data, grad, m, v, out, *numbers, data.size)


def adam_update(grad: Array, m: Array, v: Array, *, grad_scale: float | Array, **settings: Any) -> Array:
    """See ``update.adam_update``."""
    if not _plain(grad, m, v):
        return specification.adam_update(grad, m, v, grad_scale=grad_scale, **settings)
    out = array_module(grad).empty(grad.shape, grad.dtype)
    numbers = *_adam(**settings), *_number(grad_scale)
    launch("update", "adam_update", (grad.dtype,), _grid(grad), (_THREADS,), grad, m, v, out, *numbers, grad.size)
    return out


def _adam(*, step: int, betas: tuple[float, float], epsilon: float) -> tuple[float, ...]:
    """b1, b2, 1 / (1 - b1^t), 1 / (1 - b2^t) and epsilon."""
    b1, b2 = betas
    return b1, b2, 1 / (1 - b1**step), 1 / (1 - b2**step), float(epsilon)


def _number(x: float | Array) -> tuple[float, Array | None]:
    """A number as kernels take it: itself, or where it is."""
    return (float(x), None) if isinstance(x, int | float) else (1.0, x)


def sgd(
    data: Array, grad: Array, m: Array, *, rate: float, momentum: float, decay: float, grad_scale: float | Array
) -> None:
    """See ``update.sgd``."""
    numbers = {"rate": float(rate), "momentum": momentum, "decay": float(decay)}
    if not _plain(data, grad, m):
        specification.sgd(data, grad, m, grad_scale=grad_scale, **numbers)
        return
    scale = _number(grad_scale)
    launch(
        "update", "sgd", (data.dtype,), _grid(data), (_THREADS,), data, grad, m, *numbers.values(), *scale, data.size
    )


def nesterov(grad: Array, m: Array, *, momentum: float, grad_scale: float | Array) -> Array:
    """See ``update.nesterov``."""
    if not _plain(grad, m):
        return specification.nesterov(grad, m, momentum=momentum, grad_scale=grad_scale)
    out = array_module(grad).empty(grad.shape, grad.dtype)
    numbers = momentum, *_number(grad_scale)
    launch("update", "nesterov", (grad.dtype,), _grid(grad), (_THREADS,), grad, m, out, *numbers, grad.size)
    return out


def descend(data: Array, direction: Array, *, rate: float | Array, decay: float) -> None:
    """See ``update.descend``."""
    if not _plain(data, direction):
        specification.descend(data, direction, rate=rate, decay=decay)
        return
    numbers = *_number(rate), float(decay)
    launch("update", "descend", (data.dtype,), _grid(data), (_THREADS,), data, direction, *numbers, data.size)


def _grid(x: Array) -> tuple[int]:
    return (math.ceil(x.size * x.itemsize / (_THREADS * PACK)),)


def _plain(*arrays: Array) -> bool:
    return all(x.flags.c_contiguous for x in arrays)
