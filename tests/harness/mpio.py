"""The interpreter for the tests marked ``mpio``: one whose h5py is built with MPI (``tests/mpio.sh``)."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

RANKS = {1, 2, 3, 4}  # more add no case of their own


@functools.cache
def find() -> tuple[str | None, str]:
    """(the interpreter, "") or (None, why there is none).

    The one that HPCMP_MPIO_PYTHON names; unless HPCMP_MPIO_MISSING says why there is none, this one, or the one that
    ``tests/run.sh`` has built beside it.
    """
    named, missing = (os.environ.get(f"HPCMP_MPIO_{key}") for key in ("PYTHON", "MISSING"))
    built = Path(f"{sys.prefix}-mpio")
    if named and not _has_mpi(named):
        raise pytest.UsageError(f"HPCMP_MPIO_PYTHON={named}: its h5py has no MPI")
    if named:
        return named, ""
    if missing:
        return None, missing
    if _has_mpi(sys.executable):
        return sys.executable, ""
    if (built / "hpcmp-mpio").exists() and _has_mpi(str(built / "bin" / "python")):
        return str(built / "bin" / "python"), ""
    return None, "no h5py with MPI; `bash tests/run.sh` builds one where there is a parallel HDF5"


def python() -> str:
    """The interpreter, for a program that a serial test marked ``mpio`` launches."""
    found, why = find()
    if found is None:
        pytest.skip(why)
    return found


def _has_mpi(interpreter: str) -> bool:
    program = "import sys, h5py; sys.exit(not h5py.get_config().mpi)"
    try:
        return subprocess.run([interpreter, "-c", program], capture_output=True).returncode == 0
    except OSError:
        return False
