"""Attention: by cuDNN where it serves (16 bits, no dropout, head sizes that are multiples of 8; documents that are kept
apart: see ``cudnn_documents``), else in tiles by ``sources/attention.cu``; neither keeps a number of the scores."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ...arrays import Array, array_module, is_half, wide
from ...documents import First
from ...random import DropoutMask
from .. import attention as specification
from ..half import widened
from . import cudnn, cudnn_documents
from .launch import FLOATS, MASK, declare, launch, mask_arguments

_SIZES = 64, 128, 256  # head sizes that the kernels are compiled for; others are filled up to the next
_WARPS = 4  # of a block

_FORWARD, _QUERIES, _KEYS = "attention_forward", "attention_backward_queries", "attention_backward_keys"

#: ``Problem`` of attention.cu.
_PROBLEM = np.dtype(
    [(name, np.int64) for name in ("s", "t", "batch", "heads", "groups", "d", "causal", "dropped")]
    + [(name, np.int64, 3) for name in ("q", "kv", "o", "do")]
)


class _Tiling(NamedTuple):
    """The template arguments after the type, see attention_tiles.cuh."""

    size: int
    rows: int
    members: int
    columns: int

    @property
    def block_rows(self) -> int:
        return _WARPS * self.rows * 32 // self.members

    def shared(self, kernel: str, itemsize: int) -> int:
        """Bytes of shared memory: forward has queries in rows, keys and values in columns, backward two of each."""
        rows = (1 if kernel == _FORWARD else 2) * self.block_rows
        return (rows + 2 * self.columns) * (self.size * itemsize + 16)


@functools.cache
def _tiling(kernel: str, itemsize: int, d: int) -> _Tiling:
    """As many rows a warp as leave room in registers for what it sums up, and columns that leave room in shared memory
    for several blocks."""
    size = next(size for size in _SIZES if size >= d)
    if itemsize == 2:
        sums = 2 * size if kernel == _KEYS else size
        return _Tiling(size, 4 if sums <= 128 else 2, 4, 64 if kernel == _FORWARD and sums <= 128 else 32)
    row = size * itemsize
    return _Tiling(size, 4 if row <= 256 else 2, max(4, row // 128), 32 if row <= 512 else 16)


def _instances(kernel: str) -> list[tuple[Any, ...]]:
    sizes = zip(FLOATS, (4, 8, 2, 2), strict=True)
    return [(name, *_tiling(kernel, itemsize, size)) for name, itemsize in sizes for size in _SIZES]


declare(
    "attention",
    {
        "attention_delta": FLOATS,
        **{kernel: _instances(kernel) for kernel in (_FORWARD, _QUERIES, _KEYS)},
    },
)
declare("attention_merge", {"attention_merge": FLOATS})


def attention(
    q: Array,
    kv: Array,
    scale: float,
    mask: DropoutMask | None = None,
    causal: bool = True,
    first: First | None = None,
) -> tuple[Array, Array]:
    """See ``attention.attention``."""
    if not _fits(q, kv, mask):
        found: tuple[Array, Array] = _specification("attention", q)(q, kv, scale, mask, causal, first)
        return found
    if mask is None and cudnn.serves(q, kv):
        if done := _by_cudnn("attention", first)(q, kv, scale, causal):
            return done
    (s, b, n, d), xp = q.shape, array_module(q)
    q, kv = _rows(q), _rows(kv)
    o, lse = xp.empty(q.shape, q.dtype), xp.empty((b, n, s), wide(q.dtype))
    arrays = q, kv[..., 0, :], kv[..., 1, :], o, lse
    _launch(_FORWARD, (s, n, b), d, _problem(q, kv, None, None, causal, mask), arrays, scale, mask, first)
    return o, lse


def attention_backward(
    do: Array,
    q: Array,
    kv: Array,
    o: Array,
    lse: Array,
    scale: float,
    mask: DropoutMask | None = None,
    causal: bool = True,
    first: First | None = None,
) -> tuple[Array, Array]:
    """See ``attention.attention_backward``."""
    if not _fits(q, kv, mask):
        backward = _specification("attention_backward", q)
        found: tuple[Array, Array] = backward(do, q, kv, o, lse, scale, mask, causal, first)
        return found
    do, o = do.astype(q.dtype, copy=False), o.astype(q.dtype, copy=False)
    if mask is None and cudnn.serves(q, kv):
        if done := _by_cudnn("attention_backward", first)(do, q, kv, o, lse, scale, causal):
            return done
    (s, b, n, d), t, groups, xp = q.shape, kv.shape[0], kv.shape[2], array_module(q)
    do, q, kv, o = map(_rows, (do, q, kv, o))
    lse, delta = xp.ascontiguousarray(lse, wide(q.dtype)), xp.empty((b, n, s), wide(q.dtype))
    dq, dkv = xp.empty(q.shape, q.dtype), xp.empty(kv.shape, q.dtype)
    problem = _problem(q, kv, o, do, causal, mask)
    grid, block = _by_rows(delta.size, d * q.itemsize)
    launch("attention", "attention_delta", (q.dtype,), grid, block, problem, do, o, delta)
    arrays = q, kv[..., 0, :], kv[..., 1, :], do, lse, delta
    _launch(_QUERIES, (s, n, b), d, problem, (*arrays, dq), scale, mask, first)
    _launch(_KEYS, (t, groups, b), d, problem, (*arrays, dkv), scale, mask, first)
    return dq, dkv


def merge_attention(o1: Array, lse1: Array, o2: Array, lse2: Array) -> tuple[Array, Array]:
    """See ``attention.merge_attention``."""
    xp, dtype = array_module(o1), o1.dtype
    s, b, n, d = o1.shape
    o1, o2 = (xp.ascontiguousarray(x, dtype) for x in (o1, o2))
    lse1, lse2 = (xp.ascontiguousarray(x, wide(dtype)) for x in (lse1, lse2))
    o, lse = xp.empty(o1.shape, dtype), xp.empty(lse1.shape, wide(dtype))
    grid, block = _by_rows(s * b * n, d * dtype.itemsize)
    launch("attention_merge", "attention_merge", (dtype,), grid, block, o1, lse1, o2, lse2, o, lse, s, b * n, d)
    return o, lse


def _by_rows(rows: int, nbytes: int) -> tuple[tuple[int], tuple[int, int]]:
    """The grid and the block for rows of so many bytes: up to a warp each, of which a thread takes 16 at once."""
    threads = min(32, 1 << max(0, -(-nbytes // 16) - 1).bit_length())
    return (-(-rows * threads // 256),), (threads, 256 // threads)


def _fits(q: Array, kv: Array, mask: DropoutMask | None) -> bool:
    """Whether the kernels here can: not without queries or keys, nor for heads of more than 256, nor for a mask whose
    columns are more than two runs (a ring's are two)."""
    runs = 0 if mask is None else len(mask.runs)
    return bool(q.size and kv.size and q.dtype == kv.dtype and q.shape[-1] <= _SIZES[-1] and runs <= 2)


def _specification(name: str, q: Array) -> Any:
    kernel = getattr(specification, name)
    return widened(name, kernel) if is_half(q.dtype) else kernel


def _by_cudnn(name: str, first: First | None) -> Callable[..., tuple[Array, Array] | None]:
    if first is None or first.everything:
        return getattr(cudnn, name)  # type: ignore[no-any-return]
    return functools.partial(getattr(cudnn_documents, name), first=first)


def _rows(x: Array) -> Array:
    """``x``, or a copy, such that the numbers of a head follow each other."""
    return x if x.strides[-1] == x.itemsize else array_module(x).ascontiguousarray(x)


def _problem(q: Array, kv: Array, o: Array | None, do: Array | None, causal: bool, mask: DropoutMask | None) -> Any:
    strides = tuple(() if x is None else x.strides[:3] for x in (q, kv, o, do))
    return _described(q.shape, kv.shape, q.itemsize, strides, causal, mask is not None)


@functools.lru_cache(1024)
def _described(
    q: tuple[int, ...],
    kv: tuple[int, ...],
    itemsize: int,
    strides: tuple[tuple[int, ...], ...],
    causal: bool,
    dropped: bool,
) -> Any:
    """A ``Problem``."""
    s, b, n, d = q
    found = np.zeros((), _PROBLEM)
    for name, value in {"s": s, "t": kv[0], "batch": b, "heads": n, "groups": kv[2], "d": d}.items():
        found[name] = value
    found["causal"], found["dropped"] = causal, dropped
    for name, steps in zip(("q", "kv", "o", "do"), strides, strict=True):
        if steps:
            found[name] = [step // itemsize for step in steps]
    return found


def _launch(
    kernel: str,
    over: tuple[int, int, int],
    d: int,
    problem: Any,
    arrays: tuple[Array, ...],
    scale: float,
    mask: DropoutMask | None,
    first: First | None,
) -> None:
    """Over so many rows, heads and samples."""
    q, (rows, heads, samples) = arrays[0], over
    tiling, first_key = _tiling(kernel, q.itemsize, d), first and first.rows
    drawn: tuple[Any, ...] = _NO_MASK
    if mask is not None:
        s, b, n, _ = q.shape
        drawn = mask_arguments(mask, (b, n, s), array_module(q))
    grid, block = (-(-rows // tiling.block_rows), heads, samples), (32 * _WARPS,)
    shared = tiling.shared(kernel, q.itemsize)
    given = problem, *arrays, first_key, scale, *drawn
    launch("attention", kernel, (q.dtype, *tiling), grid, block, *given, shared=shared)


_NO_MASK = np.zeros((), MASK), None, None, None, None
