"""GPUs: whether there are any, whether this process may use them, and whether what drives them fits."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from ...comm.detect import launcher
from ...comm.device import assign, visible
from ...process import cores
from ...training.versions import ask, load
from .base import Check, Ranks, Subject, by_host, some

PCI = Path("/sys/bus/pci/devices")
NVIDIA = "0x10de"  # the maker's number on the PCI bus
NCCL = 21003  # 2.10.3, the first that sums bfloat16


@dataclass(frozen=True)
class Gpus:
    """What a rank sees of GPUs. seen: a name for each, the same in every process of the host; free: the share of the
    memory of the fullest that nobody has; why: what CuPy fails with; cards, driver, nodes: whether there are cards,
    their driver, and its files in /dev; shown: CUDA_VISIBLE_DEVICES; wheels: packages of CuPy; cores: of this rank;
    near: those next to each GPU; local: the rank's number on its host, if the launcher says it."""

    host: str
    seen: tuple[str, ...] = ()
    name: str = ""
    free: float = 1.0
    why: str = ""
    cards: bool = False
    driver: bool = False
    nodes: bool = False
    shown: str | None = None
    wheels: tuple[str, ...] = ()
    runs: tuple[int, int] = (0, 0)
    nccl: int = 0
    shares: bool = False
    cores: frozenset[int] = frozenset()
    near: tuple[frozenset[int], ...] = ()
    local: int | None = None


def count() -> int:
    """How many GPUs CuPy finds."""
    cupy, _ = load("cupy")
    return int(ask(cupy.cuda.runtime.getDeviceCount, 0)) if cupy else 0


def look(ranks: Ranks) -> Gpus:
    """This rank's."""
    cupy, why = load("cupy")
    found = count()
    runtime: Any = cupy.cuda.runtime if cupy else None
    seen = tuple(visible(ranks.host)) if found else ()
    return Gpus(
        ranks.host,
        seen,
        ask(lambda: runtime.getDeviceProperties(0)["name"].decode(), "unknown") if found else "",
        min((_free(cupy, i) for i in range(found)), default=1.0),
        why,
        any(_is_card(device) for device in PCI.glob("*")),
        Path("/proc/driver/nvidia/version").exists(),
        Path("/dev/nvidiactl").exists(),
        os.environ.get("CUDA_VISIBLE_DEVICES"),
        tuple(sorted(name for name in (d.metadata["Name"] or "" for d in distributions()) if name.startswith("cupy"))),
        (ask(runtime.driverGetVersion, 0), ask(runtime.runtimeGetVersion, 0)) if runtime else (0, 0),
        ask(lambda: load("cupy.cuda.nccl")[0].get_version(), 0) if cupy else 0,
        os.environ.get("HPCMP_SHARE_GPU") == "1",
        cores(),
        tuple(_near(name.split()[0]) for name in seen),
        started.local_rank if (started := launcher()) else None,
    )


def _free(cupy: Any, index: int) -> float:
    def memory() -> float:
        with cupy.cuda.Device(index) as device:
            free, total = device.mem_info
        return float(free / total)

    return float(ask(memory, 1.0))


def _is_card(device: Path) -> bool:
    try:
        maker, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
    except OSError:
        return False
    return maker == NVIDIA and kind.startswith("0x03")


def present_check(ranks: list[Gpus]) -> Check:
    """Whether every rank finds a GPU where its host has one; what is missing, if not."""
    blind = [rank for rank in ranks if not rank.seen]
    if not blind:
        mine = ranks[0]
        here = sum(rank.host == mine.host for rank in ranks)
        return Check("GPUs", "ok", f"{len(mine.seen)} x {mine.name} for {here} ranks on this host")
    rank = min(blind, key=lambda each: not (each.cards or each.driver))
    where = some(each.host for each in blind)
    if rank.shown is not None and rank.shown in ("", "-1"):
        value = f"CUDA_VISIBLE_DEVICES={rank.shown} hides all of them on {where}"
        return Check("GPUs", "warn", value, "`unset CUDA_VISIBLE_DEVICES`, or ask for GPUs (`--gpus-per-node`)")
    if rank.driver and not rank.nodes:
        value = f"a driver, and none of its devices in /dev on {where}: a container, or a job, without GPUs"
        return Check("GPUs", "warn", value, "`docker run --gpus all`, `apptainer exec --nv`, `srun --gpus-per-node=N`")
    if rank.driver and rank.why:
        value = f"an NVIDIA driver, but no CuPy on {where}: {rank.why}"
        return Check("GPUs", "warn", value, "`pip install cupy-cuda12x`, or -cuda13x: as nvidia-smi's CUDA is")
    if rank.driver:
        value = f"CuPy finds no GPU on {where}, where a driver is"
        return Check("GPUs", "warn", value, "`nvidia-smi` says why; ask for GPUs in the job (`--gpus-per-node=N`)")
    if rank.cards:
        value = f"NVIDIA cards, and no driver, on {where}"
        return Check("GPUs", "warn", value, "ask for its driver: `modprobe nvidia`, `dmesg | grep -i nvrm`")
    if len(blind) < len(ranks):
        value = f"none on {where}, and {ranks.index(next(r for r in ranks if r.seen))} is the first rank with some"
        return Check("GPUs", "warn", value, "start all ranks on nodes of one kind (`--constraint`, `--partition`)")
    if not rank.why:
        return Check("GPUs", "warn", "CuPy finds no GPU", "run on a node with a GPU and its driver, or on the CPU")
    return Check("GPUs", "ok", 'none: train.device = "cpu"')


def _chosen(ranks: list[Gpus]) -> list[int]:
    """The index of the GPU that each rank of a run would take (``comm.device``)."""
    return assign([rank.seen for rank in ranks], [rank.local for rank in ranks])


def share_check(ranks: list[Gpus]) -> Check | list[Check]:
    """Whether ranks would share a GPU, chosen as a run would."""
    if not all(rank.seen for rank in ranks) or ranks[0].shares:
        return []
    chosen = _chosen(ranks)
    holders = Counter(rank.seen[i] for rank, i in zip(ranks, chosen, strict=True))
    crowded = [rank for rank, i in zip(ranks, chosen, strict=True) if holders[rank.seen[i]] > 1]
    if not crowded:
        return []
    there = by_host(ranks)[crowded[0].host]
    gpus = len({gpu for rank in there for gpu in rank.seen})
    advice = f"start at most one rank a GPU: `mpirun --map-by ppr:{gpus}:node`, `srun --ntasks-per-node={gpus}`"
    return Check("GPUs of ranks", "warn", f"{len(there)} ranks share {gpus} GPUs on {crowded[0].host}", advice)


def driver_check(ranks: list[Gpus]) -> Check | list[Check]:
    """Whether the driver runs the CUDA that CuPy is built for, and there is one CuPy."""
    checks = []
    old = [rank for rank in ranks if 0 < rank.runs[0] // 1000 < rank.runs[1] // 1000]
    if old:
        driver, runtime = (f"{number // 1000}.{number % 1000 // 10}" for number in old[0].runs)
        value = f"the driver on {some(rank.host for rank in old)} runs CUDA up to {driver}, and CuPy is of {runtime}"
        advice = f"`pip install cupy-cuda{old[0].runs[0] // 1000}x` in place of it, or ask for a newer driver"
        checks.append(Check("CUDA", "problem", value, advice))
    double = [rank for rank in ranks if len(rank.wheels) > 1]
    if double:
        value = f"{' and '.join(double[0].wheels)} are installed: each has overwritten the other"
        checks.append(Check("CUDA", "problem", value, f"`pip uninstall {' '.join(double[0].wheels)}`, and install one"))
    return checks


def nccl_check(ranks: list[Gpus]) -> Check | list[Check]:
    """Whether there is an NCCL that is new enough."""
    bad = [rank for rank in ranks if rank.seen and rank.nccl < NCCL]
    if not bad:
        return []
    advice = '`pip install nvidia-nccl-cu12` or -cu13, or set communication.backend = "mpi"'
    code = bad[0].nccl
    what = f"{code // 10000}.{code // 100 % 100}.{code % 100} is older than 2.10.3" if code else "there is none"
    return Check("NCCL", "warn", f"{what} on {some(rank.host for rank in bad)}", advice)


def busy_check(ranks: list[Gpus]) -> Check | list[Check]:
    """Whether somebody else has the GPUs' memory."""
    bad = [rank for rank in ranks if rank.seen and rank.free < 0.8]
    if not bad:
        return []
    value = f"{100 * (1 - bad[0].free):.0f}% of a GPU's memory is taken on {some(rank.host for rank in bad)}"
    return Check("GPU memory", "warn", value, "`nvidia-smi` shows by whom: `kill` what a dead job left")


def near_check(ranks: list[Gpus]) -> Check | list[Check]:
    """Whether each rank's cores are those next to its GPU, chosen as a run would: copies to it are slower else."""
    if not all(rank.seen for rank in ranks):
        return []
    pairs = zip(ranks, _chosen(ranks), strict=True)
    far = [(rank, rank.near[i]) for rank, i in pairs if i < len(rank.near) and rank.near[i]]
    far = [(rank, near) for rank, near in far if not near & rank.cores]
    if not far:
        return []
    (_, near), hosts = far[0], some(rank.host for rank, _ in far)
    who = f"{len(far)} rank{'s' * (len(far) > 1)} on {hosts}"
    value = f"no core of {who} is next to its GPU, which has cores {min(near)} to {max(near)}"
    return Check("GPU and cores", "warn", value, "`srun --gpu-bind=closest`, or `mpirun --map-by numa --bind-to numa`")


def _near(bus: str) -> frozenset[int]:
    """The cores next to the GPU with this bus id; none where the system does not say."""
    try:
        text = (PCI / bus.lower() / "local_cpulist").read_text()
    except OSError:
        return frozenset()
    ends = [[int(end) for end in part.split("-")] for part in text.strip().split(",") if part]
    return frozenset(core for part in ends for core in range(part[0], part[-1] + 1))


SUBJECT = Subject("GPUs", look, (present_check, share_check, near_check, driver_check, nccl_check, busy_check))
