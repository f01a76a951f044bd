"""Overrides of ``reference`` for CuPy arrays; what is not here runs as it stands there.

Nothing here has run on a GPU yet (see docs/gpu.md).
"""

from __future__ import annotations

import functools
from typing import Any

from ..arrays import Array
from . import reference


def embedding_backward_weight(grad: Array, ids: Array, first: int, dy: Array) -> None:
    """See ``reference.embedding_backward_weight``. Each row's sum is in the order of the tokens, the same in every run.

    (CuPy's ``add.at`` adds with atomics, in no fixed order.)
    """
    import cupy

    row = (ids - first).reshape(-1)
    here = cupy.flatnonzero((row >= 0) & (row < grad.shape[0]))
    if here.size == 0:
        return
    here = here[cupy.argsort(row[here])]  # CuPy's sort is stable: the tokens of a row keep their order
    row = row[here]
    begins = cupy.flatnonzero(row[1:] != row[:-1]) + 1
    start = cupy.concatenate([cupy.zeros(1, begins.dtype), begins])
    stop = cupy.concatenate([begins, cupy.full(1, row.size, begins.dtype)])
    width = grad.shape[1]
    columns = cupy.arange(width)
    grad[row[start]] += _sum_rows()(reference.rows(dy), here, start[:, None], stop[:, None], columns, width)


@functools.cache
def _sum_rows() -> Any:
    """total[s, column] = sum over t from start[s] to stop[s] of x[order[t], column]."""
    import cupy

    return cupy.ElementwiseKernel(
        "raw T x, raw int64 order, int64 start, int64 stop, int64 column, int64 width",
        "T total",
        "total = 0; for (long long t = start; t < stop; t++) total += x[order[t] * width + column];",
        "hpcmp_sum_rows",
    )
