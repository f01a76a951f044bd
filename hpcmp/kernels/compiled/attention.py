"""Attention in blocks of queries: a block's scores stay in the second-level cache, the matrix products are CBLAS's.

The loops call ``cblas_sgemm`` or ``cblas_dgemm`` through its address, so that no Python runs between the products. A
thread takes some pairs of sample and key-value head, each from beginning to end. Of keys that a block's first query
does not see, as they are before its document, none is computed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...documents import First
from ...random import DropoutMask
from .. import attention as specification
from .. import blas
from ..threads import share
from .gemm import NO, T, gemm_at
from .jit import FAST, exp, inline, jit, largest
from .random import draw, room, rows_of

Floats = NDArray[np.floating]

_ROWS = 64  # queries of a block: more read the keys less often, fewer compute less beyond the diagonal


def attention(
    q: Floats,
    kv: Floats,
    scale: float,
    mask: DropoutMask | None = None,
    causal: bool = True,
    first: First | None = None,
) -> tuple[Floats, Floats]:
    """See ``attention.attention``."""
    gemm = blas.address(q.dtype)
    if gemm is None or not q.size or not kv.size:
        return specification.attention(q, kv, scale, mask, causal, first)
    (s, b, n, _), (t, _, groups, *_) = q.shape, kv.shape
    q, k, v = map(_strided, (q, kv[..., 0, :], kv[..., 1, :]))
    o, lse = np.empty(q.shape, q.dtype), np.empty((b, n, s), q.dtype)
    places = np.array([_place(x) for x in (q, k, v, o)])
    drawn, factor, begins = rows_of(mask, q.dtype), q.dtype.type(scale), _begins(first)

    def work(a: int, b: int) -> None:
        scores = np.empty((_ROWS, t), q.dtype)
        _attention(o, lse, scores, drawn, begins, places, factor, causal, gemm, groups, a, b)

    share(b * groups, s * b * n * t, work)
    return o, lse


def attention_backward(
    do: Floats,
    q: Floats,
    kv: Floats,
    o: Floats,
    lse: Floats,
    scale: float,
    mask: DropoutMask | None = None,
    causal: bool = True,
    first: First | None = None,
) -> tuple[Floats, Floats]:
    """See ``attention.attention_backward``."""
    gemm = blas.address(q.dtype)
    if gemm is None or not q.size or not kv.size:
        return specification.attention_backward(do, q, kv, o, lse, scale, mask, causal, first)
    (s, b, n, _), (t, _, groups, *_) = q.shape, kv.shape
    q, k, v = map(_strided, (q, kv[..., 0, :], kv[..., 1, :]))
    do, o, lse = (np.ascontiguousarray(x, q.dtype) for x in (do, o, lse))
    dq, dkv = np.empty(q.shape, q.dtype), (np.empty if first is None else np.zeros)(kv.shape, q.dtype)
    places = np.array([_place(x) for x in (q, k, v, do, dq, dkv[..., 0, :], dkv[..., 1, :])])
    drawn, factor, begins = rows_of(mask, q.dtype), q.dtype.type(scale), _begins(first)

    def work(a: int, b: int) -> None:
        p, ds = np.empty((2, _ROWS, t), q.dtype)
        _attention_backward(do, o, lse, p, ds, drawn, begins, places, factor, causal, gemm, groups, a, b)

    share(b * groups, s * b * n * t, work)
    return dq, dkv


def merge_attention(o1: Floats, lse1: Floats, o2: Floats, lse2: Floats) -> tuple[Floats, Floats]:
    """See ``attention.merge_attention``."""
    s, b, n, d = o1.shape
    lse = np.logaddexp(lse1, lse2)
    finite = np.where(lse == -np.inf, 0, lse)  # else exp(-inf + inf)
    w1, w2 = (np.ascontiguousarray(np.exp(part - finite).transpose(2, 0, 1)).reshape(-1) for part in (lse1, lse2))
    x, y = (np.ascontiguousarray(part).reshape(s * b * n, d) for part in (o1, o2))
    o = np.empty(x.shape, x.dtype)
    share(len(o), o.size, lambda i, j: _merge(x[i:j], y[i:j], w1[i:j], w2[i:j], o[i:j]))
    return o.reshape(o1.shape), lse


def _begins(first: First | None) -> NDArray[np.int32]:
    """The first key of each query, (b, s); none for all of them."""
    return np.empty((0, 0), np.int32) if first is None else first.host


def _strided(x: Floats) -> Floats:
    """``x`` (s, b, n, d), or a copy, such that a head's (s, d) is a matrix to CBLAS: rows of adjacent numbers."""
    step, size = x.strides[0], x.itemsize
    rows = x.shape[0] == 1 or (step % size == 0 and step >= x.shape[3] * size)
    return x if rows and x.strides[3] == size and x.flags.aligned else np.ascontiguousarray(x)


def _place(x: Floats) -> tuple[int, ...]:
    """Where ``x`` (s, b, n, d) lies: its address, its steps to the next position, sample and head in bytes, and the
    first of these in numbers. One type for any strides, so that the loops are compiled once."""
    step = x.strides[0] if x.shape[0] > 1 else x.shape[3] * x.itemsize
    return x.ctypes.data, step, *x.strides[1:3], step // x.itemsize


@inline(FAST)
def _at(place: Any, position: int, sample: int, head: int) -> Any:
    """The address of a head's row."""
    return place[0] + position * place[1] + sample * place[2] + head * place[3]


@jit
def _attention(
    o: Floats, lse: Floats, scores: Floats, drawn: Any, begins: Any, places: Any, scale: Any, causal: bool, gemm: int,
    groups: int, first: int, last: int,
) -> None:  # fmt: skip
    real = o.dtype.type
    zero, one = real(0), real(1)
    s, n, d, t = o.shape[0], o.shape[2], o.shape[3], scores.shape[1]
    q, k, v, out = places[0], places[1], places[2], places[3]
    heads, sums = n // groups, np.empty(_ROWS, o.dtype)
    dropped, words, keep = len(drawn[0]) > 0, room(), np.empty(t, o.dtype)
    apart = begins.size > 0
    for pair in range(first, last):
        i, g = pair // groups, pair % groups
        for h in range(g * heads, (g + 1) * heads):
            for a in range(0, s, _ROWS):
                rows = min(_ROWS, s - a)
                end = a + rows if causal else t
                begin = min(begins[i, a], end) if apart else 0  # columns of scores are keys from here on
                width = end - begin
                gemm_at(gemm, NO, T, rows, width, d, scale, _at(q, a, i, h), q[4], _at(k, begin, i, g), k[4], zero,
                        scores.ctypes.data, t)  # fmt: skip
                for r in range(rows):
                    seen = (a + r + 1 if causal else t) - begin
                    unseen = min(begins[i, a + r] - begin, seen) if apart else 0
                    row, rest = scores[r, unseen:seen], scores[r, seen:width]
                    for j in range(unseen):
                        scores[r, j] = zero
                    for j in range(rest.size):
                        rest[j] = zero
                    if row.size == 0:
                        lse[i, h, a + r], sums[r] = -np.inf, zero
                        continue
                    top = largest(row)
                    total = zero
                    for j in range(row.size):
                        row[j] = exp(row[j] - top)
                        total += row[j]
                    lse[i, h, a + r] = top + np.log(total)
                    if dropped:
                        part = keep[: row.size]
                        draw(part, drawn, (i * n + h) * s + a + r, words, begin + unseen)
                        for j in range(part.size):
                            row[j] *= part[j]
                    sums[r] = one / total
                gemm_at(gemm, NO, NO, rows, d, width, one, scores.ctypes.data, t, _at(v, begin, i, g), v[4], zero,
                        _at(out, a, i, h), out[4])  # fmt: skip
                for r in range(rows):
                    x, factor = o[a + r, i, h], sums[r]
                    for j in range(x.size):
                        x[j] *= factor


@jit
def _attention_backward(
    do: Floats, o: Floats, lse: Floats, p: Floats, ds: Floats, drawn: Any, begins: Any, places: Any, scale: Any,
    causal: bool, gemm: int, groups: int, first: int, last: int,
) -> None:  # fmt: skip
    real = o.dtype.type
    zero, one = real(0), real(1)
    s, n, d, t = o.shape[0], o.shape[2], o.shape[3], p.shape[1]
    q, k, v, dout, dq, dk, dv = places[0], places[1], places[2], places[3], places[4], places[5], places[6]
    heads, scores, dscores = n // groups, p.ctypes.data, ds.ctypes.data
    dropped, words, keep = len(drawn[0]) > 0, room(), np.empty(t, o.dtype)
    apart = begins.size > 0
    for pair in range(first, last):
        i, g = pair // groups, pair % groups
        # What is there counts once the first head's last queries have been there, if these see all keys.
        old = one if apart else zero
        for h in range(g * heads, (g + 1) * heads):
            for block in range((s - 1) // _ROWS, -1, -1):
                a = block * _ROWS
                rows = min(_ROWS, s - a)
                end = a + rows if causal else t
                begin = min(begins[i, a], end) if apart else 0  # columns of scores are keys from here on
                width = end - begin
                keys, values, dkeys = _at(k, begin, i, g), _at(v, begin, i, g), _at(dk, begin, i, g)
                queries, given, dvalues = _at(q, a, i, h), _at(dout, a, i, h), _at(dv, begin, i, g)
                gemm_at(gemm, NO, T, rows, width, d, scale, queries, q[4], keys, k[4], zero, scores, t)
                gemm_at(gemm, NO, T, rows, width, d, one, given, dout[4], values, v[4], zero, dscores, t)
                for r in range(rows):
                    seen = (a + r + 1 if causal else t) - begin
                    unseen = min(begins[i, a + r] - begin, seen) if apart else 0
                    row, drow, top = p[r, :width], ds[r, :width], lse[i, h, a + r]
                    x, y = do[a + r, i, h], o[a + r, i, h]
                    mean = zero
                    for j in range(d):
                        mean += x[j] * y[j]
                    if dropped:
                        draw(keep[unseen:seen], drawn, (i * n + h) * s + a + r, words, begin + unseen)
                        for j in range(np.uint64(unseen), np.uint64(seen)):  # not negative, as LLVM needs to know
                            weight = exp(row[j] - top)
                            drow[j] = scale * weight * (drow[j] * keep[j] - mean)
                            row[j] = weight * keep[j]
                    else:
                        for j in range(np.uint64(unseen), np.uint64(seen)):
                            weight = exp(row[j] - top)
                            drow[j] = scale * weight * (drow[j] - mean)
                            row[j] = weight
                    for j in range(unseen):
                        row[j], drow[j] = zero, zero
                    for j in range(seen, width):
                        row[j], drow[j] = zero, zero
                gemm_at(gemm, T, NO, width, d, rows, one, scores, t, given, dout[4], old, dvalues, dv[4])
                gemm_at(gemm, T, NO, width, d, rows, one, dscores, t, queries, q[4], old, dkeys, dk[4])
                old = one
                gemm_at(gemm, NO, NO, rows, d, width, one, dscores, t, keys, k[4], zero, _at(dq, a, i, h), dq[4])


@jit
def _merge(x: Floats, y: Floats, w1: Floats, w2: Floats, o: Floats) -> None:
    for r in range(x.shape[0]):
        first, second, out, p, q = x[r], y[r], o[r], w1[r], w2[r]
        for i in range(out.size):
            out[i] = first[i] * p + second[i] * q
