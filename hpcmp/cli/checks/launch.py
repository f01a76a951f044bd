"""The launch: the MPI library, who started the ranks, on which nodes, and the job that they are in."""

from __future__ import annotations

import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...batch import find_job, launcher
from ...batch.scheduler import ask_time_left
from ...comm import detect
from ...comm.fit import divisors
from ...comm.topology import Topology
from . import gpu
from .base import Check, Ranks, Subject, some


@dataclass(frozen=True)
class Launch:
    """How a rank was started. libraries: the MPI libraries that it has loaded; own, found: the mpirun that belongs to
    the first of them, and the one on PATH; job_nodes: of its batch job, 0 if unknown."""

    host: str
    libraries: tuple[str, ...] = ()
    launcher: str = ""
    level: str = "multiple"
    aware: bool = False
    gpus: int = 0
    own: str = ""
    found: str = ""
    job_nodes: int = 0


def look(ranks: Ranks) -> Launch:
    """This rank's; MPI has been started."""
    mpi: Any = sys.modules["mpi4py.MPI"]
    started, library = launcher(), detect.mpi_library()
    own, found = detect.mpiexec(library), shutil.which("mpirun") or shutil.which("mpiexec")
    return Launch(
        ranks.host,
        tuple(map(str, detect.mpi_libraries())),
        started.name if started else "",
        ("single", "funneled", "serialized", "multiple")[mpi.Query_thread()],
        detect.cuda_aware(mpi),
        gpu.count(),
        str(own or ""),
        found or "",
        find_job().nodes,
    )


def library_check(ranks: list[Launch]) -> Check:
    """The MPI library; a problem where a process has two."""
    twice = [rank for rank in ranks if len(rank.libraries) > 1]
    if twice:
        value = f"two in one process on {some(rank.host for rank in twice)}: {' and '.join(twice[0].libraries)}"
        advice = "build mpi4py and h5py with one MPI, and load one module of MPI: `module list`, `echo $LD_PRELOAD`"
        return Check("MPI library", "problem", value, advice)
    return Check("MPI library", "ok", ranks[0].libraries[0] if ranks[0].libraries else "linked into mpi4py")


def launcher_check(ranks: list[Launch]) -> Check:
    """Who started the ranks, and whether all nodes of the job have some."""
    hosts = {rank.host for rank in ranks}
    count = f"{len(ranks)} rank{'s' * (len(ranks) > 1)} on {some(hosts)}"
    mine = ranks[0]
    value = f"{mine.launcher}, {count}" if mine.launcher else count
    if len(ranks) > 1 and len(hosts) < mine.job_nodes:
        value += f"; the job has {mine.job_nodes} nodes"
        advice = "start with the scheduler's own launcher (`srun --mpi=pmix`), or name the nodes: `mpirun --hostfile`"
        return Check("launcher", "warn", value, advice)
    return Check("launcher", "ok", value)


def mpirun_check(ranks: list[Launch]) -> Check | list[Check]:
    """Of a process that was started alone: whether the mpirun on PATH belongs to the MPI library."""
    mine = ranks[0]
    if mine.launcher or not mine.own:
        return []
    if not mine.found:
        return Check("mpirun", "warn", "there is none on PATH", f"start ranks with {mine.own}")
    if os.path.realpath(mine.found) == os.path.realpath(mine.own) or Path(mine.found).parent == Path(mine.own).parent:
        return Check("mpirun", "ok", mine.found)
    value = f"{mine.found} is on PATH, and belongs to another MPI than {mine.libraries[0]}"
    return Check("mpirun", "warn", value, f"start ranks with {mine.own}, or put its folder first on PATH")


def thread_check(ranks: list[Launch]) -> Check:
    """Whether threads beside the main one may call MPI."""
    mine = ranks[0]
    if mine.level == "multiple":
        return Check("thread level", "ok", mine.level)
    advice = "take an MPI built with --enable-mpi-thread-multiple: without, a watchdog cannot end the other ranks"
    return Check("thread level", "warn", f"{mine.level}, not multiple", advice)


def cuda_check(ranks: list[Launch]) -> Check:
    """Whether MPI takes pointers to GPU memory."""
    mine = ranks[0]
    detour = "train with NCCL, or load a CUDA-aware MPI: arrays go through host memory" if mine.gpus else ""
    bad = bool(mine.gpus) and not mine.aware
    return Check("CUDA-aware MPI", "warn" if bad else "ok", "yes" if mine.aware else "no", detour if bad else "")


def node_check(topology: Topology) -> Check:
    """Which ranks share a node, and the sizes of tp that stay within one (docs/topology.md)."""
    sizes = topology.sizes
    value = str(topology)
    if len(sizes) > 1:
        tp = [str(n) for n in divisors(math.gcd(*sizes)) if n > 1]
        value += f"; tp = {' or '.join(tp)} stays on a node" if tp else "; no tp stays on a node"
        value += "" if topology.in_order else "; ranks of a node are not consecutive: a mesh sorts them"
    if "HPCMP_NODES" in os.environ:
        advice = "`unset HPCMP_NODES`, which is for tests on one machine"
        return Check("nodes", "warn", f"{value} (by HPCMP_NODES={os.environ['HPCMP_NODES']})", advice)
    advice = "start as many ranks on every node: `mpirun --map-by ppr:N:node`, `srun --ntasks-per-node=N`"
    uneven = len(set(sizes)) > 1
    return Check("nodes", "warn" if uneven else "ok", value, advice if uneven else "")


def job_check(ranks: Ranks, needed: float = 0.0) -> Check:
    """The batch job, and the time that it has left, which rank 0 asks the scheduler; ``needed``: the seconds that a run
    has to have. Collective."""
    from ...training.metrics import clock

    job, left, why = find_job(), None, ""
    if ranks.rank == 0:
        try:
            left = ask_time_left(job)
        except ValueError as error:
            why = str(error)
    left, why = ranks.first((left, why))
    if why:
        advice = "set train.minutes: nobody else ends the run in time; and ask whether nodes may ask the scheduler"
        return Check("batch job", "warn", f"{job}: its time limit is unknown: {why}", advice)
    value = str(job) if left is None else f"{job}, {clock(left)} left"
    if left is not None and left < needed:
        advice = f"ask for more (`--time`), or lower train.margin below {left:.0f}: the run would stop after a step"
        return Check("batch job", "problem", f"{value}; train.margin = {needed:g} s", advice)
    return Check("batch job", "ok", value)


SUBJECT = Subject("launch", look, (library_check, launcher_check, mpirun_check, thread_check, cuda_check))
