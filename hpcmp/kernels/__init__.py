"""The maths on local arrays: one function a kernel, forward and backward twins.

``of(x)`` is the kernel set for the library that ``x`` belongs to. ``reference``, and ``update`` for optimizers, are the
specification of every kernel and the oracle of every test; ``cpu`` and ``cuda`` override what is worth overriding.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from ..arrays import Array
from . import cpu, cuda, reference, update


class KernelSet:
    """The functions of the specification, and in place of some those of ``overrides``."""

    def __init__(self, *overrides: ModuleType) -> None:
        for module in (reference, update, *overrides):
            functions = {k: v for k, v in vars(module).items() if callable(v) and not k.startswith("_")}
            vars(self).update({k: v for k, v in functions.items() if v.__module__ == module.__name__})

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"there is no kernel {name!r}")


REFERENCE, CPU, CUDA = KernelSet(), KernelSet(cpu), KernelSet(cuda)


def of(x: Array) -> KernelSet:
    """The kernels for arrays like ``x``."""
    return CPU if isinstance(x, np.ndarray) else CUDA
