"""Cores: threads, what they are bound to, what a container lets them have, and how fast they are."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...batch import launcher
from ...comm import detect
from . import cgroup, gpu
from .base import Check, Ranks, Subject, by_host, some

_DYNAMIC = ("intel_pstate", "amd-pstate", "amd-pstate-epp")  # drivers that raise the frequency under "powersave"


@dataclass(frozen=True)
class Cores:
    """What a rank computes with. allowed: the cores that its job has on the host; quota: the cores whose time it may
    use; load: processes of the host that want a core, this job's included; left: processes of hpcmp that nobody waits
    for; numa: the cores of each NUMA node; rate: GFLOP/s."""

    host: str
    share: detect.Share
    rate: float = 0.0
    allowed: frozenset[int] = frozenset()
    quota: float | None = None
    load: float = 0.0
    left: tuple[int, ...] = ()
    numa: tuple[frozenset[int], ...] = ()
    governor: str = ""
    launched: bool = False
    gpus: int = 0


def look(ranks: Ranks) -> Cores:
    """This rank's; takes some 20 ms of computing."""
    return Cores(
        ranks.host,
        detect.share(),
        gemm_rate(),
        cgroup.cores() or frozenset(range(os.cpu_count() or 1)),
        cgroup.quota(),
        os.getloadavg()[0],
        leftovers(),
        tuple(cgroup.numbers(path.read_text()) for path in _system("node/node*/cpulist")),
        _governor(),
        launcher() is not None,
        gpu.count(),
    )


def gemm_rate(n: int = 768) -> float:
    """GFLOP/s of the best of three float32 products of n x n matrices: 2 n^3 operations each."""
    import numpy as np

    from ...kernels import blas

    a = np.ones((n, n), np.float32)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        blas.gemm(a, a)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times[1:]) / 1e9


def leftovers() -> tuple[int, ...]:
    """This user's processes of hpcmp that compute and whose launcher has gone: ranks that outlived their job."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state == "R" and parent == "1" and folder.stat().st_uid == os.getuid():
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if any(Path(os.fsdecode(word)).name == "hpcmp" for word in words) and int(folder.name) != os.getpid():
                    found.append(int(folder.name))
        except (OSError, ValueError):  # it has ended
            continue
    return tuple(sorted(found))


def core_check(ranks: Sequence[Cores]) -> Check:
    """Whether the threads of each host's ranks fit its cores, and use them."""
    share = ranks[0].share
    value = f"threads of a rank: {share.threads}, cores that it may use: {len(share.cores)}"
    for host, there in by_host(ranks).items():
        if found := _crowded(there) or _idle(there):
            return Check("cores", "warn", f"{found[0]} on {host}", found[1])
    return Check("cores", "ok", value)


def _crowded(there: list[Cores]) -> tuple[str, str] | None:
    """What is wrong where threads outnumber the cores that they are bound to."""
    cores = frozenset().union(*(rank.share.cores for rank in there))
    spare, most = there[0].allowed - cores, max(rank.share.threads for rank in there)
    if len(there) > len(cores) and len(there) <= len(cores | spare):
        value = f"{len(there)} ranks are bound to {_named(cores)}, of {len(there[0].allowed)} that the job has"
        advice = "start with `mpirun --map-by core --bind-to core` or `srun --cpu-bind=cores`, without taskset"
        return value, advice
    alone = [rank for rank in there if rank.share.threads > len(rank.share.cores)]
    if alone and spare and most * len(there) <= len(there[0].allowed):
        mine = alone[0].share
        value = f"{mine.threads} threads of a rank are bound to {_named(mine.cores)}"
        advice = f"start with `mpirun --map-by slot:PE={most}` or `srun --cpus-per-task={most} --cpu-bind=cores`"
        return value, f"{advice}; or set OMP_NUM_THREADS={len(mine.cores)}"
    if warning := detect.oversubscription(len(there), [rank.share for rank in there]):
        value, _, advice = warning.partition(": ")
        return value, advice
    return None


def _idle(there: list[Cores]) -> tuple[str, str] | None:
    """What is wrong where a job leaves more than half of its cores idle."""
    used, allowed = sum(rank.share.threads for rank in there), len(there[0].allowed)
    if 2 * used >= allowed or there[0].gpus or not there[0].launched:
        return None
    each = allowed // len(there)
    value = f"{used} of the job's {allowed} cores have a thread"
    return value, f"set OMP_NUM_THREADS={each} and start with `mpirun --map-by slot:PE={each}`, or start more ranks"


def _named(cores: frozenset[int]) -> str:
    names = sorted(cores)
    return f"core{'s' * (len(names) > 1)} {', '.join(map(str, names[:4]))}" + (" ..." if len(names) > 4 else "")


def quota_check(ranks: list[Cores]) -> Check | list[Check]:
    """Whether a container or the scheduler stops threads that have cores."""
    for host, there in by_host(ranks).items():
        quota, wanted = there[0].quota, sum(rank.share.threads for rank in there)
        if quota is not None and quota < wanted:
            value = f"the container may use the time of {quota:g} cores on {host}, for {wanted} threads: it is stopped"
            few = max(1, int(quota // len(there)))
            advice = f"ask for more (`docker run --cpus {wanted}`, Kubernetes limits.cpu), or set OMP_NUM_THREADS={few}"
            return Check("CPU quota", "warn", value, advice)
    return []


def numa_check(ranks: list[Cores]) -> Check | list[Check]:
    """Whether each of a host's ranks stays on one NUMA node, where it would fit."""
    for host, there in by_host(ranks).items():
        for rank in there if len(there) > 1 and len(there[0].numa) > 1 else ():
            touched = sum(bool(rank.share.cores & node) for node in rank.numa)
            if touched > 1 and rank.share.threads <= max(map(len, rank.numa)):
                value = f"a rank may run on {touched} NUMA nodes of {host}: its memory is far from some of its threads"
                advice = "start with `mpirun --map-by numa --bind-to numa` or `srun --cpu-bind=ldoms`"
                return Check("NUMA", "warn", value, advice)
    return []


def governor_check(ranks: list[Cores]) -> Check | list[Check]:
    """Whether cores are kept at a low frequency."""
    slow = [rank for rank in ranks if rank.governor]
    if not slow:
        return []
    value = f"cores are kept at a low frequency on {some(rank.host for rank in slow)} ({slow[0].governor})"
    return Check("frequency", "warn", value, "ask for `cpupower frequency-set -g performance` (`srun --cpu-freq=high`)")


def load_check(ranks: list[Cores]) -> Check | list[Check]:
    """Whether others use the hosts' cores: ranks that outlived their job, or anybody."""
    checks, busy = [], []
    for host, there in by_host(ranks).items():
        count, wanted = max(len(rank.allowed) for rank in there), sum(rank.share.threads for rank in there)
        left = sorted({pid for rank in there for pid in rank.left})
        if left:
            value = f"{len(left)} processes of hpcmp run on {host}, and nobody waits for them"
            checks.append(Check("load", "warn", value, f"if a job left them: `kill {' '.join(map(str, left[:8]))}`"))
        elif there[0].load - wanted > count / 2:
            busy.append((there[0].load, f"the {count} cores of {host}, {wanted} of them this job's"))
    if busy:
        load, which = max(busy)
        more = f" ({len(busy) - 1} hosts more have too many)" if len(busy) > 1 else ""
        advice = "see what else runs there: `top`; ask for nodes of your own (`--exclusive`)"
        checks.append(Check("load", "warn", f"{load:.0f} processes want {which}{more}", advice))
    return checks


def rate_check(ranks: list[Cores]) -> Check:
    """Whether all ranks compute about as fast: a job goes at the pace of the slowest."""
    slow, fast = (choose(ranks, key=lambda rank: rank.rate) for choose in (min, max))
    value = f"{slow.rate:.0f} GFLOP/s on the slowest rank, {fast.rate:.0f} on the fastest (float32, all at once)"
    uneven = f"see what else runs on host {slow.host}, or leave it out (`--exclude`)"
    bad = slow.rate < fast.rate / 2
    return Check("matrix product", "warn" if bad else "ok", value, uneven if bad else "")


def _governor() -> str:
    """The governor that keeps the first core slow; "" if none does."""
    folder = cgroup.ROOT / "sys/devices/system/cpu/cpu0/cpufreq"
    names = [
        path.read_text().strip() for path in (folder / "scaling_governor", folder / "scaling_driver") if path.exists()
    ]
    return names[0] if names[:1] == ["powersave"] and names[1:] and names[1] not in _DYNAMIC else ""


def _system(pattern: str) -> list[Path]:
    return sorted((cgroup.ROOT / "sys/devices/system").glob(pattern))


SUBJECT = Subject("cores", look, (core_check, quota_check, numa_check, governor_check, load_check, rate_check))
