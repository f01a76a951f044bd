"""What the loops are compiled with, and the exponential function that vectorises.

Numba compiles a loop anew when the file that it stands in has changed. What of this file, ``gemm`` or ``random`` is
part of a loop it does not watch: after a change there, delete ``__pycache__`` beside it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import math
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

#: Sums may be reordered, which vectors need; numbers that are not finite stay what they are, for a step looks for them.
FAST = {"reassoc", "contract", "arcp", "nsz", "afn"}
_OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}


def jit(function: Callable[..., None]) -> Callable[..., None]:
    """A loop over contiguous arrays, compiled for the dtype of its first argument at the first call with it.

    The result is kept in ``__pycache__``, where that can be written to, else in the user's cache directory. The first
    of the processes of a node that needs it compiles, the others wait and load it: see ``_first``.
    """
    compiled = njit(fastmath=FAST, **_OPTIONS)(function)
    known: set[Any] = set()

    @functools.wraps(function)
    def call(*args: Any) -> None:
        dtype = args[0].dtype
        if dtype in known:
            compiled(*args)
            return
        with _first(f"{function.__module__}.{function.__name__}.{dtype}"):
            compiled(*args)
        known.add(dtype)

    call.compiled = compiled  # type: ignore[attr-defined]
    return call


def inline(flags: Any) -> Any:
    """Makes of a function a piece of loops, to be called inside one; flags: Numba's ``fastmath``."""
    return njit(fastmath=flags, forceinline=True, **_OPTIONS)


@contextlib.contextmanager
def _first(name: str) -> Iterator[None]:
    """Within, this process is the only one of the node with ``name``, or one that came after such a one had left.

    So that the first compiles alone, and those that waited for it read what it has left side by side. Where files
    cannot be locked, all compile: slow, but right.
    """
    path = os.path.join(tempfile.gettempdir(), f"hpcmp-kernels-{os.getuid()}.lock")
    place = zlib.crc32(name.encode()) >> 1
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            except BlockingIOError:
                fcntl.lockf(descriptor, fcntl.LOCK_SH, 1, place)
                fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, place)
        yield
    finally:
        os.close(descriptor)


def exp(x: Any) -> Any:
    """e^x inside a loop: of a float64 the C library's; of a float32 a polynomial, to 2e-7 of the value.

    float32: with n the integer nearest to x / ln 2 and r = x - n ln 2 it is 2^n (1 + r + r^2 P(r)), P of degree 5 as in
    Moshier's Cephes library (expf). Below -87, where it would leave the normal numbers, it is 0, and above 88 e^88.
    LLVM has no vectors of ``math.exp``; this has no branch and no call.
    """
    return math.exp(x)


_LOG2E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
_LEAST, _MOST, _ZERO, _ONE = np.float32(-87), np.float32(88), np.float32(0), np.float32(1)
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_BIAS, _ROUND = np.float32(127), np.float32(127.5)


def _single(x: Any) -> Any:
    least = x < _LEAST
    x = _MOST if x > _MOST else _LEAST if least else x
    biased = _floor(x * _LOG2E + _ROUND)
    n = biased - _BIAS
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
    y = (p * r * r + r + _ONE) * _power(biased)
    return _ZERO if least else y


def _double(x: Any) -> Any:
    return math.exp(x)


# Not "reassoc", which would join the two parts of ln 2.
@overload(exp, jit_options={"fastmath": {"contract"}, "forceinline": True, "error_model": "numpy"})
def _exp(x: Any) -> Any:
    return _single if x == types.float32 else _double


@intrinsic
def _floor(context: Any, x: Any) -> Any:
    """The largest integer below, as a float32 (``math.floor`` makes an int64, for which there are half the lanes)."""

    def generate(target: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic("llvm.floor", [ir.FloatType()]), args)

    return types.float32(types.float32), generate


@intrinsic
def _power(context: Any, biased: Any) -> Any:
    """2^(biased - 127), by writing the exponent's bits."""

    def generate(target: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = builder.shl(builder.fptosi(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 23))
        return builder.bitcast(word, ir.FloatType())

    return types.float32(types.float32), generate


@intrinsic
def _maximum(context: Any, a: Any, b: Any) -> Any:
    """The larger of two; not a number if one is none. (Of comparisons LLVM makes vectors only if none may be such.)"""

    def generate(target: Any, builder: Any, signature: Any, args: Any) -> Any:
        real = args[0].type
        kind = ir.FunctionType(real, [real, real])
        return builder.call(builder.module.declare_intrinsic("llvm.maximum", [real], kind), args)

    return a(a, b), generate


@inline(FAST)
def largest(x: Any) -> Any:
    """The largest of some numbers, of which there is one; not a number if any is none."""
    top = x[0]
    for i in range(x.size):
        top = _maximum(top, x[i])
    return top
