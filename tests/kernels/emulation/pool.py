"""Memory of the stand-in for a device: handed out again as soon as it is free, NaN until written, never unmapped."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcmp.kernels.cuda.graphs import Memory
from tests.kernels.emulation.backend import FILL

Plain = np.ndarray[Any, Any]


class Block:
    """Some bytes of a pool, until nobody holds this."""

    def __init__(self, pool: Pool, bytes: Plain) -> None:
        self.pool, self.bytes, self.ptr = pool, bytes, bytes.ctypes.data

    def __del__(self, fill: int = FILL) -> None:  # at Python's end there are no globals
        self.bytes[:] = fill
        self.pool.free.setdefault(self.bytes.size, []).append(self.bytes)


class Pool:
    """Memory by its size, what was freed last first."""

    def __init__(self) -> None:
        self.free: dict[int, list[Plain]] = {}
        self.all: list[Plain] = []

    def __call__(self, size: int) -> Block:
        size = -(-size // 512) * 512
        if not self.free.get(size):
            made = np.full(size + 512, FILL, np.uint8)
            start = -made.ctypes.data % 512
            self.free.setdefault(size, []).append(made[start : start + size])
            self.all.append(made[start : start + size])
        return Block(self, self.free[size].pop())


class Freed:
    """Tells a capture's memory when an array is gone."""

    def __init__(self, memory: Memory, at: int) -> None:
        self.memory, self.at = memory, at

    def __del__(self) -> None:
        self.memory.free(self.at)
