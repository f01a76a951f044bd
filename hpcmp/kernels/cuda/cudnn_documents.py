"""Causal attention within documents by cuDNN: a sample's documents are the entries of a batch, in the arrays where they
lie, and their lengths and where they begin are read on the device.

One call a sample: its documents follow each other, which is what cuDNN is tested with; those of several samples do not,
whose positions take turns. For the same reason the heads of a position are adjacent in the log-sum-exp. The number of
documents and the rows of the longest are rounded up, so that few graphs are built; the entries too many have no rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ...arrays import Array, array_module
from ...documents import First
from . import cudnn
from .cudnn import BACKWARD, FORWARD, Graph, Tensor, aligned
from .multiply import address

_ROWS = 128  # of a tile of cuDNN's at most: what is less is rounded up to it


@dataclass(frozen=True, eq=False)
class Plan:
    """The documents of a microbatch, for attention of any shape: made once, not for every layer.

    count, longest: of how many entries and rows at most graphs are built. total: no fewer rows than a sample has, whole
    tiles. lengths: (batch, count) int32, on the device. begins: (batch, count + 2) int64, on the host: the first row of
    each, and behind the last for the entries too many.
    """

    count: int
    longest: int
    total: int
    lengths: Array
    begins: NDArray[np.int64]

    @functools.cached_property
    def _on_device(self) -> dict[int, Array]:
        return {}

    def offsets(self, step: int) -> Array:
        """``begins`` in numbers of an array whose rows are ``step`` numbers apart, on the device."""
        if step not in self._on_device:
            self._on_device[step] = array_module(self.lengths).asarray(self.begins * step)
        return self._on_device[step]


#: By the documents of a microbatch; None where some query sees others than those of its own document before it.
_plans: WeakKeyDictionary[First, Plan | None] = WeakKeyDictionary()

#: What a layout's graph was built to; None where it is not supported.
_built: dict[tuple[Any, ...], Any] = {}


def attention(q: Array, kv: Array, scale: float, causal: bool, first: First) -> tuple[Array, Array] | None:
    """``attention.attention`` without dropout, of arrays that are not empty; None where cuDNN does not serve it.

    The log-sum-exp is a view whose heads are adjacent.
    """
    if (plan := _plan(q, causal, first)) is None:
        return None
    q, kv = aligned(q), aligned(kv)
    (s, b, n, _), xp = q.shape, array_module(q)
    o, stats = xp.empty(q.shape, q.dtype), _stats(s, b, n, xp)
    done = _run(FORWARD, (q, kv[..., 0, :], kv[..., 1, :], o, stats), scale, plan)
    return (o, stats.transpose(1, 2, 0)) if done else None


def attention_backward(
    do: Array, q: Array, kv: Array, o: Array, lse: Array, scale: float, causal: bool, first: First
) -> tuple[Array, Array] | None:
    """``attention.attention_backward`` without dropout, of arrays that are not empty; None as above."""
    if (plan := _plan(q, causal, first)) is None:
        return None
    do, q, kv, o = (aligned(x) for x in (do, q, kv, o))
    (s, b, n, _), xp, stats = q.shape, array_module(q), lse.transpose(2, 0, 1)
    if stats.dtype != np.float32 or stats.strides[::2] != (4 * n, 4) or (stats.strides[1] | address(stats)) % 16:
        stats = _stats(s, b, n, xp)
        stats[...] = lse.transpose(2, 0, 1)
    dq, dkv = xp.empty(q.shape, q.dtype), xp.empty(kv.shape, kv.dtype)
    given = q, kv[..., 0, :], kv[..., 1, :], o, do, stats
    done = _run(BACKWARD, (*given, dq, dkv[..., 0, :], dkv[..., 1, :]), scale, plan)
    return (dq, dkv) if done else None


def _plan(q: Array, causal: bool, first: First) -> Plan | None:
    """None where cuDNN is not to be asked: its backward needs head sizes that are multiples of 16 here."""
    if not causal or q.shape[-1] % 16 or not cudnn.loaded().takes_documents:
        return None
    if first not in _plans:
        _plans[first] = plan(first)
    return _plans[first]


def plan(first: First) -> Plan | None:
    """The plan for documents; None where they do not fill each sample, one after the other."""
    begins = [np.flatnonzero(row == np.arange(row.size)) for row in first.host]
    lengths = [np.diff(some, append=row.size) for some, row in zip(begins, first.host, strict=True)]
    for row, some, sizes in zip(first.host, begins, lengths, strict=True):
        if not np.array_equal(row, np.repeat(some, sizes)):
            return None
    count, s = _power(max(map(len, begins)), 4), first.host.shape[1]
    total = -(-s // _ROWS) * _ROWS
    sizes_of, begins_of = np.zeros((len(begins), count), np.int32), np.full((len(begins), count + 2), s, np.int64)
    for i, (some, sizes) in enumerate(zip(begins, lengths, strict=True)):
        begins_of[i, : len(some)], sizes_of[i, : len(some)] = some, sizes
    longest = min(total, _power(int(sizes_of.max()), _ROWS))
    return Plan(count, longest, total, array_module(first.rows).asarray(sizes_of), begins_of)


def _power(n: int, least: int) -> int:
    """The next power of two."""
    return max(least, 1 << (n - 1).bit_length())


def _stats(s: int, b: int, n: int, xp: Any) -> Array:
    """(s, b, n), the heads of a position side by side, and samples one after the other at multiples of 16 bytes."""
    found: Array = xp.empty((b, -(-s // 4) * 4, n), np.float32)
    return found[:, :s].transpose(1, 0, 2)


def _run(names: tuple[str, ...], operands: Sequence[Array], scale: float, plan: Plan) -> bool:
    """Whether cuDNN did it, sample by sample."""
    library = cudnn.loaded()
    layout = names, scale, plan.count, plan.longest, plan.total, *((x.dtype, x.shape, x.strides) for x in operands)
    if layout not in _built:
        _built[layout] = library.build(describe(names, operands, scale, plan))
    if (built := _built[layout]) is None:
        return False
    offsets = [plan.offsets(x.strides[0] // x.itemsize) for x in operands]
    for sample in range(len(plan.begins)):
        at = [address(x) + sample * x.strides[1] for x in operands]
        begins = [address(x) + sample * x.strides[0] for x in offsets]
        lengths = address(plan.lengths) + sample * plan.lengths.strides[0]
        library.execute(built, (*at, *begins, lengths, lengths))
    return True


def describe(names: tuple[str, ...], operands: Sequence[Array], scale: float, plan: Plan) -> Graph:
    """The graph of ``names`` for one sample of ``operands``, (s, b, n, d), and (s, b, n) for the statistics."""
    tensors = []
    for x in operands:
        step, head = x.strides[0] // x.itemsize, x.strides[2] // x.itemsize
        dim = plan.count, x.shape[2], plan.longest, x.shape[3] if x.ndim == 4 else 1
        tensors.append(Tensor(dim, (plan.longest * step, head, step, 1), x.dtype.name))
    return Graph(names, tuple(tensors), scale, True, plan.total)
