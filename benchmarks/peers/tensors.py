"""The tensors of ``benchmarks/checkpoint.py``, and which part of each a rank has: weights of transformer blocks and two
moments, tensor parallel as Megatron has it. NumPy alone."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Shape = tuple[int, ...]


def tensors(hidden: int, blocks: int) -> dict[str, tuple[Shape, int | None]]:
    """Name -> (shape, the axis along which ranks share it; None: all have it)."""
    h = hidden
    layers: dict[str, tuple[Shape, int | None]] = {
        "attention/qkv": ((3 * h, h), 0),
        "attention/out": ((h, h), 1),
        "mlp/up": ((4 * h, h), 0),
        "mlp/down": ((h, 4 * h), 1),
        "norm": ((h,), None),
    }
    kinds = "model", "optimizer/m", "optimizer/v"
    return {f"{kind}/blocks/{i}/{name}": v for kind in kinds for i in range(blocks) for name, v in layers.items()}


def index(shape: Shape, axis: int | None, ranks: int, rank: int) -> tuple[slice, ...]:
    """The part of a rank, of a tensor whose ``axis`` the ranks share evenly."""
    cut = {} if axis is None else {axis: slice(shape[axis] * rank // ranks, shape[axis] * (rank + 1) // ranks)}
    return tuple(cut.get(i, slice(0, n)) for i, n in enumerate(shape))


def values(hidden: int, blocks: int, ranks: int, rank: int) -> dict[str, Any]:
    """A rank's arrays, of float32 that cannot be compressed; what all have is alike."""
    own, alike = np.random.default_rng(rank), np.random.default_rng(ranks)
    return {
        name: (alike if axis is None else own).standard_normal(
            [s.stop - s.start for s in index(shape, axis, ranks, rank)], np.float32
        )
        for name, (shape, axis) in tensors(hidden, blocks).items()
    }


def timed(
    barrier: Callable[[], Any], first: bool, place: Path, work: Callable[[], Any], fresh: bool, size: int
) -> float:
    """Seconds of ``work`` on all ranks, from a barrier to a barrier. Before it rank 0 (``first``) removes ``place``
    (``fresh``), or has the system forget what it holds of the files there; nothing is left to be written, and every
    rank has touched ``size`` bytes of free memory, as much as it is going to write or read."""
    if first and fresh:
        shutil.rmtree(place, ignore_errors=True)
    if first:
        os.sync()
        for path in place.rglob("*") if not fresh else ():
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)
    barrier()
    if size:
        # Memory that is free may have gone back to a virtual machine's host: the first to use it again would pay.
        np.ones(size, np.uint8)
    barrier()
    start = time.perf_counter()
    work()
    barrier()
    return time.perf_counter() - start
