"""Which library an array belongs to. The rest of hpcmp never asks "is it CuPy?": it asks for the array module."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .errors import InputError

#: A NumPy or CuPy array. The two share one interface and no base class, so the type is not narrower than this.
Array = Any


def array_module(x: Array) -> ModuleType:
    """The module (``numpy`` or ``cupy``) whose functions work on ``x``; scalars belong to NumPy."""
    if isinstance(x, np.ndarray | np.generic | int | float):
        return np
    import cupy

    module: ModuleType = cupy.get_array_module(x)
    return module


def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype named in a configuration; ``bfloat16``, which NumPy lacks, is that of ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    return np.dtype(name)


def is_half(dtype: DTypeLike) -> bool:
    """Whether it is float16 or bfloat16: a format to store and send numbers in, too coarse to add them up in."""
    dtype = np.dtype(dtype)
    return dtype.itemsize == 2 and dtype.kind in "fV"  # bfloat16 is of the kind V to NumPy


def wide(dtype: DTypeLike) -> np.dtype[Any]:
    """The dtype to add up in: float32 for the formats of 16 bits, else ``dtype`` itself. Gradients, master weights,
    statistics and losses have it."""
    return np.promote_types(dtype, np.float32)


def module_for(device: str) -> ModuleType:
    """The array module of a device named in a configuration: ``"cpu"`` or ``"cuda"``. Raises InputError without it."""
    if device == "cpu":
        return np
    try:
        import cupy
    except ImportError:
        raise InputError('train.device = "cuda" needs CuPy: pip install "hpcmp[cuda12]" (or cuda13)') from None
    if not cupy.is_available():
        raise InputError('train.device = "cuda": CuPy finds no GPU (is the driver there, and a device visible?)')
    module: ModuleType = cupy
    return module


def to_host(x: Array) -> np.ndarray[Any, Any]:
    """``x`` as a NumPy array: itself if it is one, else a copy made after the work queued on its stream."""
    return x if isinstance(x, np.ndarray) else np.asarray(x.get() if hasattr(x, "get") else x)
