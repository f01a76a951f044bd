"""out = a b, + bias and + out or another array, on a GPU: by cuBLASLt where there is nvmath-python, else by cuBLAS
through CuPy.

float32 is not computed in TF32. Matrices with a contiguous axis (slices of rows or columns, transposes) are used where
they lie, others copied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...arrays import Array, array_module, is_half
from .choices import from_environment
from .lt import COMPUTE, TYPES, Launch, Lt
from .product import Product, product


def gemm(
    a: Array, b: Array, out: Array, bias: Array | None = None, *, accumulate: bool = False, onto: Array | None = None
) -> None:
    """out = a b, or out += a b; without ``accumulate`` perhaps + bias on every row, and + onto.

    a (m, k) and b (k, n) of one dtype, out (m, n) and bias (n,) of that or, from 16 bits, of float32; onto as out.
    """
    if not out.size or (accumulate and not a.shape[1]):
        return
    if not a.shape[1]:
        _preload(out, bias, onto)
        return
    if onto is not None and (onto.strides != out.strides or address(onto) % 16 != address(out) % 16):
        onto = onto.copy()  # as ``out`` lies, which is new
    beside = 0
    if bias is not None:
        bias = _beside(bias, out)
        beside = address(bias)
    at = address(a), address(b), address(out)
    key = (
        a.shape, a.strides, a.dtype, b.shape, b.strides, out.shape, out.strides, out.dtype, accumulate, beside > 0,
        at[0] % 16, at[1] % 16, at[2] % 16, onto is not None,
    )  # fmt: skip
    found = _plans.get(key)
    if found is None:
        found = _plans[key] = _plan(a, b, out, at, beside, accumulate, onto is not None)
    launch, turned, preload = found
    if launch is None:
        _copied(a, b, out, bias, accumulate, onto)
        return
    first, second = (at[0], at[1]) if turned else (at[1], at[0])
    if preload:
        _preload(out, bias, onto)
        launch(first, second, at[2], 0)
    elif onto is None:
        launch(first, second, at[2], beside)
    else:
        launch(first, second, at[2], beside, onto=address(onto))


#: By shapes, strides and alignments: what launches it (None: copy first), whether a comes before b, and whether ``out``
#: is to hold before what is added.
_plans: dict[Any, tuple[Launch | None, bool, bool]] = {}


def _plan(
    a: Array, b: Array, out: Array, at: tuple[int, int, int], beside: int, accumulate: bool, onto: bool
) -> tuple[Launch | None, bool, bool]:
    found = product(a, b, out, at, accumulate=accumulate, bias=beside > 0, onto=onto)
    if found is None:
        return None, False, False
    asked, turned = found
    ways = [(asked, False)]
    if beside or onto:
        ways.append((asked._replace(accumulate=True, bias=False, onto=False), True))
    for planner in planners():
        for p, preload in ways:
            launch = planner(p, 0 if preload else beside)
            if launch is not None:
                return launch, turned, preload
    raise RuntimeError(f"neither cuBLASLt nor cuBLAS can compute {asked}")


def fused(
    a: Array,
    b: Array,
    out: Array,
    epilogue: str,
    bias: Array | None = None,
    aux: Array | None = None,
    *,
    accumulate: bool = False,
) -> bool:
    """``gemm`` with an epilogue (see ``Product``), of 16 bits and by cuBLASLt alone: False, and nothing done, for what
    it has not.

    aux (m, n), and a bias (n,) that is written to, of out's dtype.
    """
    aux_at = 0 if aux is None else address(aux)
    packed = aux is None or (aux.flags.c_contiguous and aux_at % 16 == 0 and aux.shape[1] % 8 == 0)
    # Of k = 1 nvmath-python says that cuBLASLt does not support it.
    if not out.size or a.shape[1] < 2 or not packed or a.dtype != b.dtype or not is_half(a.dtype):
        return False
    if epilogue == "gelu" and bias is not None:
        bias = _beside(bias, out)
    at, beside = (address(a), address(b), address(out)), 0 if bias is None else address(bias)
    key = (
        epilogue, a.shape, a.strides, a.dtype, b.shape, b.strides, out.shape, out.strides, out.dtype, accumulate,
        beside > 0, at[0] % 16, at[1] % 16, at[2] % 16,
    )  # fmt: skip
    if key not in _plans:
        _plans[key] = _plan_fused(a, b, out, at, epilogue, beside, aux_at, accumulate), False, False
    launch = _plans[key][0]
    if launch is not None:
        launch(at[1], at[0], at[2], beside, aux_at)
    return launch is not None


def _plan_fused(
    a: Array, b: Array, out: Array, at: tuple[int, int, int], epilogue: str, beside: int, aux_at: int, accumulate: bool
) -> Launch | None:
    found = product(a, b, out, at, accumulate=accumulate, bias=epilogue == "gelu" and beside > 0)
    if found is None or found[1]:
        return None
    asked = found[0]._replace(epilogue=epilogue)
    return next(filter(None, (planner(asked, beside, aux_at) for planner in planners())), None)


def scaled(
    a: Array,
    b: Array,
    out: Array,
    names: tuple[str, str],
    scales: tuple[Array, Array],
    bias: Array | None = None,
    *,
    accumulate: bool = False,
) -> bool:
    """out = a b^T times both scales, + bias or + out, of matrices of 8 bits; by cuBLASLt alone: False, and nothing
    done, for what it has not.

    a (m, k) and b (n, k) are codes, of the dtypes with these names; scales (1,), float32, each.
    """
    (m, k), n, at = a.shape, len(b), (address(a), address(b), address(out))
    lie = a.flags.c_contiguous and b.flags.c_contiguous and out.strides[1:] == (out.itemsize,)
    if not (lie and out.size and k) or any(x % 16 for x in (m, n, k, *at)):  # what NVIDIA's documentation asks for
        return False
    added = bias is not None and is_half(out.dtype)  # with a result in float32 its biases are bfloat16
    preload = bias is not None and not added
    accumulate = accumulate or preload
    beside = 0 if bias is None or not added else address(bias := _beside(bias, out))
    where = address(scales[1]), address(scales[0])  # cuBLAS's first matrix is b
    key = "scaled", names, m, n, k, out.strides, out.dtype, accumulate, added
    if key not in _plans:
        found = product(a, b.T, out, at, accumulate=accumulate, bias=added)
        asked = [found[0]._replace(dtype=names[1], dtype_b=names[0])] if found else []
        plans = (planner(p, beside, 0, where) for p in asked for planner in planners())
        _plans[key] = next(filter(None, plans), None), False, False
    launch = _plans[key][0]
    if launch is not None:
        if preload:
            out[...] = bias
        launch(at[1], at[0], at[2], beside, 0, where)
    return launch is not None


def adds_biases() -> bool:
    """Whether products add biases here, as cuBLASLt's do."""
    return planners()[0] is not _cublas


def _preload(out: Array, bias: Array | None, onto: Array | None) -> None:
    """out = 0, + bias on every row, + onto."""
    out[...] = 0 if bias is None else bias
    if onto is not None:
        out += onto


def _copied(a: Array, b: Array, out: Array, bias: Array | None, accumulate: bool, onto: Array | None) -> None:
    """``gemm`` of matrices that do not lie as cuBLAS can address them."""
    xp = array_module(out)
    made = xp.empty(out.shape, out.dtype)
    gemm(xp.ascontiguousarray(a), xp.ascontiguousarray(b), made, bias)
    if accumulate:
        out += made
    else:
        out[...] = made if onto is None else made + onto


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
def planners() -> tuple[Callable[..., Launch | None], ...]:
    """What plans products here, to be asked in this order: with a product, and the addresses that ``Lt.plan`` takes."""
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


def _cublas(p: Product, bias: int, aux: int = 0, scales: Sequence[int] = ()) -> Launch | None:
    """A product by ``cublasGemmEx``, which adds no bias; while a stream is captured CuPy refuses its calls."""
    if p.bias or p.epilogue or p.onto or scales:
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
