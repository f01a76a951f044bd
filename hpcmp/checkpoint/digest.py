"""Digests of what lies in data files: running, over blocks, of the algorithm that the manifest names.

They find accidents, not forgery. ``xxh3_64`` (XXH3 of 64 bits, https://xxhash.com) runs as fast as memory; ``crc32`` is
that of checkpoints of format version 1.
"""

from __future__ import annotations

import zlib
from typing import Any, Protocol

ALGORITHM = "xxh3_64"  # of checkpoints that are written now
DIGITS = {"xxh3_64": 16, "crc32": 8}  # hexadecimal, of each algorithm


class Running(Protocol):
    """A digest of all that ``update`` was given, one after the other: C-contiguous arrays or bytes."""

    def update(self, data: Any, /) -> None:
        """Take more bytes."""

    def hexdigest(self) -> str:
        """The digest so far, in hexadecimal digits."""


def running(algorithm: str = ALGORITHM) -> Running:
    """A digest of nothing yet. Raises KeyError for an algorithm that is not in DIGITS."""
    if algorithm == "xxh3_64":
        import xxhash

        return xxhash.xxh3_64()
    return {"crc32": _Crc32}[algorithm]()


class _Crc32:
    def __init__(self) -> None:
        self.value = 0

    def update(self, data: Any, /) -> None:
        self.value = zlib.crc32(data, self.value)

    def hexdigest(self) -> str:
        return f"{self.value:08x}"
