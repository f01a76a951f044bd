"""The maths on local arrays: one function a kernel, forward and backward twins.

``of(x)`` is the kernel set for the library that ``x`` belongs to. ``reference``, with ``attention``, ``moe``, ``fp8``,
``composed`` and, for optimizers, ``update``, is the specification of every kernel and the oracle of every test;
``cpu``, ``compiled`` (by Numba, for NumPy arrays) and ``cuda`` override what is worth overriding; ``half`` makes of a
set one for arrays of 16 bits.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

import numpy as np

from ..arrays import Array, is_half
from . import attention, composed, cpu, cuda, fp8, moe, reference, update
from .half import Half


def _functions(module: ModuleType) -> dict[str, Any]:
    """The public functions that a module defines."""
    functions = {k: v for k, v in vars(module).items() if callable(v) and not k.startswith("_")}
    return {k: v for k, v in functions.items() if v.__module__ == module.__name__}


class KernelSet:
    """The functions of the specification, and in place of some those of ``overrides``."""

    def __init__(self, *overrides: ModuleType) -> None:
        for name, kernel in _functions(composed).items():
            setattr(self, name, functools.partial(kernel, self))
        for module in (reference, attention, moe, fp8, update, *overrides):
            vars(self).update(_functions(module))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"there is no kernel {name!r}")


REFERENCE, NUMPY, CUDA = KernelSet(), KernelSet(cpu), KernelSet(*cuda.MODULES)
NUMPY_HALF, CUDA_HALF = Half(NUMPY), Half(CUDA, native=cuda.NATIVE | {"matmul", "matmul_transposed"})

_kind = os.environ.get("HPCMP_KERNELS", "auto")


def use(kind: str) -> None:
    """Which kernels NumPy arrays have from now on: "auto", the compiled ones where there is Numba, or "reference",
    those in NumPy. The environment's HPCMP_KERNELS, if that is set, decides for "auto"."""
    global _kind
    _kind = os.environ.get("HPCMP_KERNELS", kind) if kind == "auto" else kind


@functools.cache
def with_numba() -> tuple[KernelSet, Half] | None:
    """The compiled kernels, for 32 or 64 bits and for 16; None without Numba. The first call imports it."""
    try:
        from .compiled import MODULES
    except ImportError:
        return None
    found = KernelSet(cpu, *MODULES)
    return found, Half(found)


def _in_use() -> tuple[KernelSet, Half]:
    """The kernels that NumPy arrays have, for 32 or 64 bits and for 16."""
    return (None if _kind == "reference" else with_numba()) or (NUMPY, NUMPY_HALF)


def __getattr__(name: str) -> Any:
    """``CPU`` and ``CPU_HALF``: the kernels that NumPy arrays have, as attributes so that Numba is imported late."""
    if name in ("CPU", "CPU_HALF"):
        return _in_use()[name == "CPU_HALF"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def of(x: Array) -> KernelSet | Half:
    """The kernels for arrays like ``x``."""
    if isinstance(x, np.ndarray):
        return _in_use()[is_half(x.dtype)]
    return CUDA_HALF if is_half(x.dtype) else CUDA
