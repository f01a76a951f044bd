"""The maths on local arrays: one function a kernel, forward and backward twins.

``of(x)`` is the kernel set for the library that ``x`` belongs to. ``reference``, with ``attention``, ``moe`` and, for
optimizers, ``update``, is the specification of every kernel and the oracle of every test; ``cpu`` and ``cuda`` override
what is worth overriding; ``half`` makes of a set one for arrays of 16 bits.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from ..arrays import Array, is_half
from . import attention, cpu, cuda, moe, reference, update
from .half import Half


class KernelSet:
    """The functions of the specification, and in place of some those of ``overrides``."""

    def __init__(self, *overrides: ModuleType) -> None:
        for module in (reference, attention, moe, update, *overrides):
            functions = {k: v for k, v in vars(module).items() if callable(v) and not k.startswith("_")}
            vars(self).update({k: v for k, v in functions.items() if v.__module__ == module.__name__})

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"there is no kernel {name!r}")


REFERENCE, CPU, CUDA = KernelSet(), KernelSet(cpu), KernelSet(cuda)
CPU_HALF, CUDA_HALF = Half(CPU), Half(CUDA, native=frozenset({"matmul", "matmul_transposed"}))


def of(x: Array) -> KernelSet | Half:
    """The kernels for arrays like ``x``."""
    if isinstance(x, np.ndarray):
        return CPU_HALF if is_half(x.dtype) else CPU
    return CUDA_HALF if is_half(x.dtype) else CUDA
