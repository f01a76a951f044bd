"""Algorithms of cuBLASLt that were found fastest, in a file: made by a run that tunes, read by every rank of others.

A line of the file is one choice, in JSON: the device, the library's version, the product, and the algorithm, which
NVIDIA documents as "can be trivially serialized and later restored for use with the same version of cuBLAS". One file
may serve any devices and versions.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ...plain import read_whole
from .product import Product

_LARGEST = 64 << 20  # bytes of a file


class Choices:
    """The choices of a file (none without one), and where new ones go.

    read: a file of choices. tune: a file that ``add`` adds to. InputError for one that cannot be read or written.
    """

    def __init__(self, read: Path | None = None, tune: Path | None = None) -> None:
        self.tune = tune
        try:
            if tune is not None:
                tune.open("ab").close()
        except OSError as error:
            raise InputError(f"HPCMP_GEMM_TUNE: {tune}: {error.strerror or error}") from None
        self.known: dict[tuple[str, int, Product], Any] = {}
        if read is not None:
            self._read(read)

    def find(self, device: str, version: int, p: Product) -> Any:
        """The algorithm chosen for a product, 64 bytes; None where the file has none."""
        return self.known.get((device, version, p))

    def add(self, device: str, version: int, p: Product, algorithm: Any, seconds: float, recommended: float) -> None:
        """Add a line to the file. recommended: the seconds of the algorithm that would be taken without it.

        Ranks may add to one file at the same time: each line is one write at its end.
        """
        assert self.tune is not None
        line = {
            "device": device,
            "cublasLt": version,
            "product": p._asdict(),
            "algorithm": bytes(algorithm).hex(),
            "microseconds": round(seconds * 1e6, 2),
            "recommended": round(recommended * 1e6, 2),
        }
        with open(self.tune, "ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")

    def _read(self, path: Path) -> None:
        try:
            text = read_whole(path, _LARGEST, links=True)
        except OSError as error:
            raise InputError(f"HPCMP_GEMM_CHOICES: {path}: {error.strerror or error}") from None
        for number, line in enumerate(text.splitlines(), 1):
            try:
                self._take(json.loads(line))
            except (ValueError, TypeError, KeyError, RecursionError):
                said = f"{path}, line {number}: not a choice as HPCMP_GEMM_TUNE writes it"
                raise InputError(f"HPCMP_GEMM_CHOICES: {said}") from None

    def _take(self, line: dict[str, Any]) -> None:
        made = line["product"]
        p = Product(**(made | {"alignment": tuple(made["alignment"])}))
        algorithm = np.frombuffer(bytes.fromhex(line["algorithm"]), np.uint8).copy()
        if algorithm.size != 64:
            raise ValueError
        self.known.setdefault((line["device"], line["cublasLt"], p), algorithm)  # of several ranks' the first


def digest() -> str | None:
    """The contents of the file that HPCMP_GEMM_CHOICES names, in short, or why it cannot be read; None where it is not
    set. Ranks that differ in it would differ in the bits of their products."""
    path = os.environ.get("HPCMP_GEMM_CHOICES")
    if not path:
        return None
    try:
        return hashlib.blake2b(read_whole(Path(path), _LARGEST, links=True), digest_size=8).hexdigest()
    except OSError as error:
        return error.strerror or str(error)


def from_environment() -> Choices:
    """As HPCMP_GEMM_CHOICES and HPCMP_GEMM_TUNE say."""
    read, tune = (os.environ.get(f"HPCMP_GEMM_{name}") for name in ("CHOICES", "TUNE"))
    return Choices(Path(read) if read else None, Path(tune) if tune else None)
