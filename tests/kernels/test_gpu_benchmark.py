"""benchmarks/gpu_kernel_table.py: each entry's arguments fit its kernel, at small sizes, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks import gpu_kernel_table as table
from hpcmp.arrays import dtype_of
from tests.kernels.emulation.backend import emulated, needs_gxx

NAMES = "TOKENS HIDDEN FFN HEADS HEAD VOCABULARY SEQUENCE PARAMETERS".split()
SIZES = dict(zip(NAMES, (6, 40, 48, 2, 16, 50, 8, 100), strict=True))


@needs_gxx
@pytest.mark.timeout(300)  # g++ builds what has changed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", table.TABLE)
def test_an_entry(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for size, n in SIZES.items():
        monkeypatch.setattr(table, size, n)
    with emulated():
        arguments, settings, amount, unit = table.TABLE[name](table.Draw(dtype_of(dtype), np))
        result: Any = table.called(name)(*arguments, **settings)
    arrays = [
        a for a in (*arguments, *(result if isinstance(result, tuple) else (result,))) if isinstance(a, np.ndarray)
    ]
    assert unit in ("B", "FLOP") and amount > 0
    if unit == "B" and "embedding" not in name:  # of a table only some rows are read
        assert amount <= 2 * sum(a.nbytes for a in arrays)
