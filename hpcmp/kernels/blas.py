"""Matrix products by the BLAS of choice: out = a b, or out += a b, on strided matrices where they lie.

NumPy's ``matmul`` cannot add to its output, and calls the BLAS that NumPy was built with. ``gemm`` calls that of any
CBLAS (``cblas``): the one that ``select`` chooses, else the variable HPCMP_BLAS, else "auto": MKL if it is there and
the processor is Intel's (for others it has slow code: docs/blas.md), else NumPy's OpenBLAS, else BLIS or the system's
CBLAS, else NumPy alone. It is found and loaded at the first product.

A large product is cut into blocks of its output, which the threads of ``threads`` make, each in a call of its own; the
library has one thread in each call, also where others call it.
"""

from __future__ import annotations

import ctypes
import functools
import os
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import partition
from ..errors import InputError
from . import threads
from .cblas import AS_IT_IS, LIBRARIES, ROW_MAJOR, TRANSPOSED, Library, find, is_intel

Matrix = NDArray[Any]

#: What ``select`` and HPCMP_BLAS take.
NAMES = ("auto", *LIBRARIES, "numpy")

_LARGEST = 2**31 - 1  # what every CBLAS can count to
_SMALL = 1 << 14  # numbers of an output that np.matmul makes sooner, its temporary included: a call here takes 8 us
_WORTH = 1 << 23  # multiplications a thread should have: a tenth of a millisecond's
_choice = "auto"


def select(name: str) -> None:
    """Make products by the library ``name`` from now on. Raises InputError where it is not installed."""
    global _choice
    _set_threads(_load(name))
    _choice = name


def current() -> Library | None:
    """The library in use, loaded if need be; None: NumPy alone."""
    return _load(_choice)


@functools.cache
def _load(name: str) -> Library | None:
    asked = name
    if name == "auto":
        asked = os.environ.get("HPCMP_BLAS", "auto")
        if asked not in NAMES:
            raise InputError(f"HPCMP_BLAS={asked}: expected {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    if asked == "auto":
        library = (find("mkl") if is_intel() else None) or find("openblas") or find("blis")
    else:
        library = find(asked) if asked in LIBRARIES else None
        if asked != "numpy" and library is None:
            said = f'train.blas = "{asked}"' if asked == name else f"HPCMP_BLAS={asked}"
            raise InputError(
                f"{said}: there is no such library here" + ('; pip install "hpcmp[mkl]"' if asked == "mkl" else "")
            )
    _set_threads(library)
    return library


def _set_threads(library: Library | None) -> None:
    """One thread in a call; without a library, ``np.matmul`` has them all."""
    for each in filter(None, {library, find("openblas")}):
        each.set_threads(1 if library else threads.count())


def address(dtype: Any) -> int | None:
    """The address of the library's ``cblas_sgemm`` or ``cblas_dgemm``, for compiled loops, or None without one; for
    sizes see ``Library``."""
    library = current()
    gemm = library.gemm.get(np.dtype(dtype)) if library else None
    return ctypes.cast(gemm, ctypes.c_void_p).value if gemm else None


def gemm(a: Matrix, b: Matrix, out: Matrix | None = None, *, accumulate: bool = False) -> Matrix:
    """out = a b, or out += a b; returns out, which is made where not given.

    a (m, k), b (k, n), out (m, n). Matrices of float32 or float64 with one axis contiguous (slices of rows or columns,
    transposes) are used where they lie; anything else is ``np.matmul``'s, with its copies, conversions and errors. The
    same arrays give the same bits on as many threads of the same processor.
    """
    if accumulate and out is None:
        raise TypeError("gemm: accumulate needs out, to add to")
    library = current()
    small = a.ndim == b.ndim == 2 and a.shape[0] * b.shape[1] <= _SMALL
    if library is not None and not small and (accumulate or not library.is_numpys or threads.count() > 1):
        if out is None and a.ndim == b.ndim == 2 and a.dtype == b.dtype and a.dtype in library.gemm:
            out = np.empty((a.shape[0], b.shape[1]), a.dtype)
        if out is not None and _call(library, a, b, out, float(accumulate)):
            return out
    if not accumulate:
        return np.matmul(a, b, out=out)
    assert out is not None
    out += np.matmul(a, b)
    return out


def _call(library: Library, a: Matrix, b: Matrix, out: Matrix, beta: float) -> bool:
    """out = a b + beta out by the library; False, and nothing done, for what it cannot address."""
    if not (a.ndim == b.ndim == out.ndim == 2 and a.dtype == b.dtype == out.dtype and out.flags.writeable):
        return False
    (m, k), n, function = a.shape, b.shape[1], library.gemm.get(a.dtype)
    if function is None or b.shape[0] != k or out.shape != (m, n) or not min(m, n, k) or max(m, n, k) > _LARGEST:
        return False
    x, y, z = _leading(a), _leading(b), _leading(out)
    if x is None or y is None or z is None or np.may_share_memory(out, a) or np.may_share_memory(out, b):
        return False
    if z[0] == TRANSPOSED:  # CBLAS transposes a and b alone: (a b)^T = b^T a^T
        return _call(library, b.T, a.T, out.T, beta)
    at = [matrix.__array_interface__["data"][0] for matrix in (a, b, out)]
    calls = [
        partial(
            function, ROW_MAJOR, x[0], y[0], rows.stop - rows.start, columns.stop - columns.start, k,
            1.0, at[0] + rows.start * a.strides[0], x[1], at[1] + columns.start * b.strides[1], y[1],
            beta, at[2] + rows.start * out.strides[0] + columns.start * out.strides[1], z[1],
        )
        for rows, columns in _blocks(m, n, min(threads.count(), 1 + m * n * k // _WORTH))
    ]  # fmt: skip
    threads.together(calls)
    return True


@functools.cache
def _blocks(m: int, n: int, count: int) -> list[tuple[slice, slice]]:
    """An m x n matrix in at most ``count`` blocks, one a thread, as square as can be: a thread reads its rows of a and
    its columns of b."""
    down = min((d for d in range(1, count + 1) if count % d == 0), key=lambda d: m / d + n * d / count)
    rows, columns = partition.split(m, min(m, down)), partition.split(n, min(n, count // down))
    return [(r, c) for r in rows for c in columns]


def _leading(x: Matrix) -> tuple[int, int] | None:
    """How CBLAS addresses a matrix: (as it is or transposed, elements from a line to the next); None where no axis is
    contiguous, or lines overlap or run backwards."""
    (rows, columns), (down, across), size = x.shape, x.strides, x.itemsize
    ways = ((AS_IT_IS, rows, columns, down, across), (TRANSPOSED, columns, rows, across, down))
    for flag, lines, length, stride, unit in ways if x.flags.aligned else ():
        leading = length if lines == 1 else stride // size
        if (unit == size or length == 1) and length <= leading <= _LARGEST and (lines == 1 or stride % size == 0):
            return flag, leading
    return None
