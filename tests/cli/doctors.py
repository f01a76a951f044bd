"""Runs of ``hpcmp doctor`` in set-ups with planted defects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCTOR = [sys.executable, "-m", "hpcmp", "doctor"]


def clean() -> dict[str, str]:
    """This environment without what a launcher, a scheduler or a person may have set."""
    foreign = ("OMPI_COMM_", "PMI_", "PMIX_", "SLURM_", "PBS_", "LSB_", "FLUX_", "HDF5_", "NCCL_", "CUDA_", "HPCMP_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    for name in ("OPENBLAS_CORETYPE", "PYTHONUTF8", "PYTHONDEVMODE", "TMPDIR"):
        kept.pop(name, None)
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def doctor(
    *argv: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | str = ROOT,
    shell: str = 'exec "$@"',
    limit: float = 60,
) -> subprocess.CompletedProcess[str]:
    """``hpcmp doctor`` alone; ``shell``: a script that starts it as "$@"."""
    command = ["bash", "-c", shell, "doctor", *DOCTOR, *argv]
    environment = clean() | dict(env or {})
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=limit)


def found(done: subprocess.CompletedProcess[str]) -> list[dict[str, str]]:
    """The checks of a --json report, which must be one object; what is bad has a remedy of one line."""
    assert done.stdout.startswith("{"), done.stderr
    result = json.loads(done.stdout)
    assert result["exit_code"] == done.returncode == any(check["status"] == "problem" for check in result["checks"])
    for check in result["checks"]:
        assert (check["status"] == "ok") is (check["advice"] == ""), check
        assert "\n" not in check["value"] + check["advice"]
    checks: list[dict[str, str]] = result["checks"]
    return checks


def lines(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    """{name: check} of a --json report, the last of each name."""
    return {check["name"]: check for check in found(done)}


def bad(checks: list[dict[str, str]], name: str, value: str, advice: str) -> str:
    """The status of the line, which must be there, that names a defect so, and its remedy so."""
    for check in checks:
        if check["name"] == name and value in check["value"] and check["status"] != "ok":
            assert advice in check["advice"], check
            return check["status"]
    raise AssertionError(f"no {name}: ... {value} ... in {json.dumps(checks, indent=1)}")


def good(checks: list[dict[str, str]], name: str, value: str) -> bool:
    """Whether nothing is said of that defect."""
    return not any(c["name"] == name and value in c["value"] and c["status"] != "ok" for c in checks)


@cache
def _mounts() -> bool:
    command = ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt"]
    try:
        return subprocess.run(command, capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


def needs_mounts() -> None:
    """Skip the test where no file system can be mounted in a namespace."""
    if not _mounts():
        pytest.skip("no file system can be mounted here: it takes root, and unshare")


def site(folder: Path, code: str) -> str:
    """A PYTHONPATH under which Python runs ``code`` when it starts, with ``rank`` known to it."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(f'import os\nrank = os.environ.get("OMPI_COMM_WORLD_RANK", "0")\n{code}\n')
    return f"{folder}:{ROOT}"


def two_hosts(numbers: str = "0,1") -> dict[str, Any]:
    """The environment in which ranks of this machine count as those of several hosts."""
    return {"PYTHONPATH": str(ROOT), "HPCMP_NODES": numbers, "OMP_NUM_THREADS": "1"}
