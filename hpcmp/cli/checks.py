"""The checks of ``hpcmp doctor``, and the facts about a rank that they compare."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import socket
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..comm import detect
from ..comm.fit import divisors
from ..comm.topology import Topology
from ..training.versions import ask, load
from ..training.versions import first_line as first_line
from ..training.versions import versions as versions

LITTLE = 2**30  # bytes of free space below which a checkpoint may not fit


@dataclass(frozen=True)
class Check:
    """One line of the report; ``advice`` says what to do about a warning or a problem."""

    name: str
    status: Literal["ok", "warn", "problem"]
    value: str
    advice: str = ""


@dataclass(frozen=True)
class Facts:
    """What one rank says of itself: rate in GFLOP/s of a matrix product, gpus that it sees."""

    host: str
    versions: dict[str, str]
    share: detect.Share
    rate: float
    gpus: int


def version_checks(ranks: list[Facts]) -> list[Check]:
    """A line for each version; a problem where hosts differ."""
    checks = []
    for name in dict.fromkeys(name for rank in ranks for name in rank.versions):
        found: dict[str, set[str]] = {}
        for rank in ranks:
            found.setdefault(rank.versions.get(name, "not found"), set()).add(rank.host)
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


def mpi_checks(mpi: Any, ranks: list[Facts]) -> list[Check]:
    """How MPI was started and what it can do."""
    started = detect.launcher()
    count = f"{len(ranks)} rank{'s' * (len(ranks) > 1)} on {_some({rank.host for rank in ranks})}"
    level = ("single", "funneled", "serialized", "multiple")[mpi.Query_thread()]
    aware = detect.cuda_aware(mpi)
    detour = "arrays go through host memory where NCCL is not used" if ranks[0].gpus and not aware else ""
    return [
        Check("MPI library", "ok", str(detect.mpi_library() or "linked into mpi4py")),
        Check("launcher", "ok", f"{started.name}, {count}" if started else count),
        Check("thread level", "ok", level),
        Check("CUDA-aware MPI", "warn" if detour else "ok", "yes" if aware else "no", detour),
    ]


def node_check(topology: Topology) -> Check:
    """Which ranks share a node, and the sizes of tp that stay within one (docs/topology.md)."""
    sizes = topology.sizes
    value = str(topology)
    if len(sizes) > 1:
        tp = [str(n) for n in divisors(math.gcd(*sizes)) if n > 1]
        value += f"; tp = {' or '.join(tp)} stays on a node" if tp else "; no tp stays on a node"
        value += "" if topology.in_order else "; ranks of a node are not consecutive: a mesh sorts them"
    if "HPCMP_NODES" in os.environ:
        advice = "unset HPCMP_NODES, which is for tests on one machine"
        return Check("nodes", "warn", f"{value} (by HPCMP_NODES={os.environ['HPCMP_NODES']})", advice)
    advice = "start as many ranks on every node" if len(set(sizes)) > 1 else ""
    return Check("nodes", "warn" if advice else "ok", value, advice)


def parallel_hdf5() -> Check:
    """Whether h5py writes one file from many ranks."""
    h5py, _ = load("h5py")
    mpio = bool(h5py and h5py.get_config().mpi)
    return Check(
        "parallel HDF5", "ok", "mpio driver" if mpio else "no mpio driver: checkpoint.storage may be any but mpio"
    )


def gpus() -> int:
    """How many GPUs CuPy finds."""
    cupy, _ = load("cupy")
    return int(ask(cupy.cuda.runtime.getDeviceCount, 0)) if cupy else 0


def gpu_check(ranks: list[Facts]) -> Check:
    """The GPUs of this host, for the ranks on it."""
    cupy, why = load("cupy")
    if not cupy:
        if Path("/proc/driver/nvidia/version").exists():
            return Check(
                "GPUs", "warn", f"an NVIDIA driver, but no CuPy: {why}", "`pip install cupy-cuda12x` or -cuda13x"
            )
        return Check("GPUs", "ok", 'none: train.device = "cpu"')
    count, here = gpus(), sum(rank.host == socket.gethostname() for rank in ranks)
    if not count:
        return Check("GPUs", "warn", "CuPy finds no GPU", "run on a node with a GPU and its driver, or on the CPU")
    name = ask(lambda: cupy.cuda.runtime.getDeviceProperties(0)["name"].decode(), "unknown")
    # A launcher may show each rank its own GPU alone; then a count of 1 for many ranks is as it should be.
    advice = "start at most one rank a GPU" if here > count and "CUDA_VISIBLE_DEVICES" not in os.environ else ""
    if ranks[0].versions.get("NCCL") == "not found":
        advice = '`pip install nvidia-nccl-cu12` or -cu13, or set communication.backend = "mpi": there is no NCCL'
    return Check("GPUs", "warn" if advice else "ok", f"{count} x {name} for {here} ranks on this host", advice)


def _blas() -> str:
    """The library of matrix products."""
    from ..kernels import blas

    return str(blas.current() or "NumPy alone")


def blas_check() -> Check:
    """Which library makes the matrix products here, and the processor that its code is for."""
    value, forced = _blas(), os.environ.get("OPENBLAS_CORETYPE")
    if forced and "OpenBLAS" in value:
        advice = "unset OPENBLAS_CORETYPE: OpenBLAS itself takes the code for this processor"
        return Check("matrix library", "warn", f"{value} (by OPENBLAS_CORETYPE={forced})", advice)
    return Check("matrix library", "ok", value)


def gemm_rate(n: int = 768) -> float:
    """GFLOP/s of the best of three float32 products of n x n matrices: 2 n^3 operations each."""
    import numpy as np

    from ..kernels import blas

    a = np.ones((n, n), np.float32)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        blas.gemm(a, a)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times[1:]) / 1e9


def core_check(ranks: list[Facts]) -> Check:
    """Whether the threads of each host's ranks fit its cores."""
    shares: dict[str, list[detect.Share]] = {}
    for rank in ranks:
        shares.setdefault(rank.host, []).append(rank.share)
    warning = next(filter(None, (detect.oversubscription(len(there), there) for there in shares.values())), "")
    mine = ranks[0].share
    value = f"threads of a rank: {mine.threads}, cores that it may use: {len(mine.cores)}"
    return Check("cores", "warn" if warning else "ok", value, warning)


def rate_check(ranks: list[Facts]) -> Check:
    """Whether all ranks compute about as fast: a job goes at the pace of the slowest."""
    slow, fast = (choose(ranks, key=lambda rank: rank.rate) for choose in (min, max))
    value = f"{slow.rate:.0f} GFLOP/s on the slowest rank, {fast.rate:.0f} on the fastest (float32, all at once)"
    uneven = f"see what else runs on host {slow.host}" if slow.rate < fast.rate / 2 else ""
    return Check("matrix product", "warn" if uneven else "ok", value, uneven)


def all_reduce_check(world: Any) -> Check:
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


def directory_check(world: Any) -> Check:
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
