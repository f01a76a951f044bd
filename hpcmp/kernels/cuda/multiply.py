"""out = a b, + bias or + out, on a GPU: by cuBLASLt where there is nvmath-python, else by cuBLAS through CuPy.

float32 is not computed in TF32. Matrices with a contiguous axis (slices of rows or columns, transposes) are used where
they lie, others copied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ...arrays import Array, array_module
from .choices import from_environment
from .lt import COMPUTE, TYPES, Launch, Lt
from .product import Product, product


def gemm(a: Array, b: Array, out: Array, bias: Array | None = None, *, accumulate: bool = False) -> None:
    """out = a b, or out += a b; without ``accumulate`` perhaps + bias on every row.

    a (m, k) and b (k, n) of one dtype, out (m, n) and bias (n,) of that or, from 16 bits, of float32.
    """
    if not out.size or (accumulate and not a.shape[1]):
        return
    if not a.shape[1]:
        out[...] = 0 if bias is None else bias
        return
    beside = 0
    if bias is not None:
        bias = _beside(bias, out)
        beside = address(bias)
    at = address(a), address(b), address(out)
    key = (
        a.shape, a.strides, a.dtype, b.shape, b.strides, out.shape, out.strides, out.dtype, accumulate, beside > 0,
        at[0] % 16, at[1] % 16, at[2] % 16,
    )  # fmt: skip
    found = _plans.get(key)
    if found is None:
        found = _plans[key] = _plan(a, b, out, at, beside, accumulate)
    launch, turned, preload = found
    if launch is None:
        _copied(a, b, out, bias, accumulate)
        return
    if preload:
        out[...] = bias
        beside = 0
    first, second = (at[0], at[1]) if turned else (at[1], at[0])
    launch(first, second, at[2], beside)


#: By shapes, strides and alignments: what launches it (None: copy first), whether a comes before b, and whether ``out``
#: is to hold the bias before.
_plans: dict[Any, tuple[Launch | None, bool, bool]] = {}


def _plan(
    a: Array, b: Array, out: Array, at: tuple[int, int, int], beside: int, accumulate: bool
) -> tuple[Launch | None, bool, bool]:
    found = product(a, b, out, at, accumulate=accumulate, bias=beside > 0)
    if found is None:
        return None, False, False
    asked, turned = found
    ways = [(asked, False)] + ([(asked._replace(accumulate=True, bias=False), True)] if beside else [])
    for planner in planners():
        for p, preload in ways:
            launch = planner(p, 0 if preload else beside)
            if launch is not None:
                return launch, turned, preload
    raise RuntimeError(f"neither cuBLASLt nor cuBLAS can compute {asked}")


def _copied(a: Array, b: Array, out: Array, bias: Array | None, accumulate: bool) -> None:
    """``gemm`` of matrices that do not lie as cuBLAS can address them."""
    xp = array_module(out)
    made = xp.empty(out.shape, out.dtype)
    gemm(xp.ascontiguousarray(a), xp.ascontiguousarray(b), made, bias)
    if accumulate:
        out += made
    else:
        out[...] = made


def _beside(bias: Array, out: Array) -> Array:
    """The bias as cuBLASLt takes it: packed, of the result's dtype, at a multiple of 16 bytes."""
    if bias.dtype == out.dtype and bias.flags.c_contiguous and address(bias) % 16 == 0:
        return bias
    return bias.astype(out.dtype, copy=True)


def address(x: Array) -> int:
    """Where an array begins, on its device."""
    at: int = x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr
    return at


@functools.cache
def planners() -> tuple[Callable[[Product, int], Launch | None], ...]:
    """What plans products here, to be asked in this order."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    device = f"{properties['name'].decode()}, {properties['multiProcessorCount']} SMs"
    stream, choices = cupy.cuda.get_current_stream, from_environment()
    try:
        from nvmath.bindings import cublasLt

        lt = Lt(cublasLt, lambda: stream().ptr, cupy.cuda.alloc, _seconds, device, choices)
    except (ImportError, RuntimeError):  # no nvmath-python, or it finds no library
        return (_cublas,)
    return lt.plan, _cublas


def _seconds(call: Callable[[], None]) -> float:
    """How long a call takes on the device: the median of five times ten calls."""
    import cupy

    call()
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    times: list[float] = []
    for _ in range(5):
        begin.record()
        for _ in range(10):
            call()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end) / 1e4)
    return sorted(times)[2]


def _cublas(p: Product, bias: int) -> Launch | None:
    """A product by ``cublasGemmEx``, which adds no bias; while a stream is captured CuPy refuses its calls."""
    if p.bias:
        return None
    from cupy.cuda import device
    from cupy_backends.cuda.libs import cublas

    wide = "float64" if p.dtype == "float64" else "float32"
    one, beta = np.ones(1, wide), np.array([p.accumulate], wide)

    def launch(a: int, b: int, out: int, bias: int) -> None:
        cublas.gemmEx(
            device.get_cublas_handle(), p.transpose_a, p.transpose_b, p.m, p.n, p.k,
            one.ctypes.data, a, TYPES[p.dtype], p.lda, b, TYPES[p.dtype], p.ldb,
            beta.ctypes.data, out, TYPES[p.out], p.ldd, COMPUTE[wide], -1,
        )  # fmt: skip

    return launch
