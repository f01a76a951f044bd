"""The package as a whole: a light import, the public names, and the README's code."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hpcmp
from tests.corpus import config, corpus

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("mpi4py", "cupy", "h5py", "matplotlib", "numpy.f2py", "tokenizers", "numba")


def test_import_is_light() -> None:
    code = f"import sys, hpcmp, hpcmp.kernels; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_takes_less_than_0_3_seconds() -> None:
    code = "import time; t = time.perf_counter(); import hpcmp; print(time.perf_counter() - t)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    assert statistics.median(times) < 0.3


def test_public_names_are_there() -> None:
    for name in hpcmp.__all__:
        assert getattr(hpcmp, name) is not None
    assert set(hpcmp.__all__) == set(dir(hpcmp))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hpcmp.nothing


def test_the_code_of_the_readme_runs(tmp_path: Path, run_mpi: Callable[..., Any]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) <= 12
    config(tmp_path, corpus(tmp_path)).rename(tmp_path / "gpt.toml")
    (tmp_path / "code.py").write_text(code)
    done = run_mpi(2, [sys.executable, str(tmp_path / "code.py")], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["10", "20"]


def test_the_command_line_says_the_version() -> None:
    done = subprocess.run([sys.executable, "-m", "hpcmp", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"hpcmp {hpcmp.__version__}"
