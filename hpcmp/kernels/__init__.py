"""The maths on local arrays: one function a kernel, forward and backward twins.

``of(x)`` is the kernel set for the library that ``x`` belongs to. ``reference`` is the specification of every kernel
and the oracle of every test; ``cpu`` and ``cuda`` override what is worth overriding.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from ..arrays import Array
from . import cpu, reference


def of(x: Array) -> ModuleType:
    """The kernels for arrays like ``x``."""
    if isinstance(x, np.ndarray):
        return cpu
    from . import cuda

    return cuda


__all__ = ["of", "reference"]
