"""One rank of a multi-rank test job: ``mpirun -n N python -m tests.harness.rank DIRECTORY [pytest options]``.

DIRECTORY/tests.json names the tests and their files. This rank writes, in DIRECTORY: ``rank<r>.jsonl``, one record as
each test ends; ``rank<r>.log``, all that it prints; ``rank<r>.stack``, its stacks when it crashes or receives SIGNAL.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

SIGNAL = signal.SIGRTMIN + 3  # not one that hpcmp or a batch system uses
RANK_VARIABLES = "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"


class Reporter:
    """A pytest plugin: run exactly the named tests in their order, and record each outcome.

    A rank whose test failed goes no further until the job's supervisor has seen the same failure on every rank: its
    next collective would be matched with one that the others still owe to this test.
    """

    def __init__(self, directory: Path, rank: int, tests: Sequence[str]) -> None:
        self.directory, self.tests = directory, tests
        self.stream = (directory / f"rank{rank}.jsonl").open("w")
        self.skipped = ""

    def send(self, **record: Any) -> None:
        self.stream.write(json.dumps(record) + "\n")
        self.stream.flush()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        found = {item.nodeid: item for item in items}
        items[:] = [found[test] for test in self.tests if test in found]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.testsfailed:  # files that do not import: the log says why
            return
        found = {item.nodeid for item in session.items}
        for test in self.tests:
            if test not in found:
                summary = "no such test under mpirun: does its name or its parameters depend on the number of ranks?"
                self.send(test=test, outcome="failed", text="", summary=summary, place="", time=time.time())
        self.send(event="ready")
        wait_for_all()

    def pytest_runtest_logstart(self) -> None:
        self.skipped = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            sections = "".join(f"\n--- {title} ---\n{content.rstrip()}" for title, content in report.sections)
            crash = getattr(report.longrepr, "reprcrash", None)
            self.send(
                test=report.nodeid,
                outcome="failed",
                text=report.longreprtext + sections,
                summary=(crash.message if crash else report.longreprtext).partition("\n")[0],
                place=f"{crash.path}:{crash.lineno}" if crash else "",
                time=time.time(),
            )
            while not (self.directory / f"go{self.tests.index(report.nodeid)}").exists():
                time.sleep(0.01)
        elif report.skipped:
            self.skipped = getattr(report, "wasxfail", "") or report.longrepr[2]  # type: ignore[index]
        elif report.when == "teardown":
            outcome = "skipped" if self.skipped else "passed"
            self.send(test=report.nodeid, outcome=outcome, text=self.skipped)

    @pytest.hookimpl(optionalhook=True)
    def pytest_timeout_set_timer(self) -> bool:
        return True  # the supervisor keeps the time


def main() -> None:
    directory, options = Path(sys.argv[1]), sys.argv[2:]
    rank = next((os.environ[key] for key in RANK_VARIABLES if key in os.environ), None)
    if rank is None:
        sys.exit("the launcher gave this process no rank: is mpirun the one of the MPI that mpi4py uses?")
    log = os.open(directory / f"rank{rank}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    stacks = (directory / f"rank{rank}.stack").open("w")
    faulthandler.enable(stacks)
    faulthandler.register(SIGNAL, stacks, all_threads=True)

    from mpi4py import MPI

    wanted = json.loads((directory / "tests.json").read_text())
    reporter = Reporter(directory, int(rank), wanted["tests"])
    reporter.send(event="start", pid=os.getpid(), size=MPI.COMM_WORLD.size)
    options += ["--only-mpi", "-q", "--color=no", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    status = pytest.main([*options, f"--basetemp={directory}/rank{rank}", *wanted["files"]], plugins=[reporter])
    sys.stdout.flush()
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        os._exit(status)  # at once: the others may never reach MPI_Finalize
    wait_for_all()


def wait_for_all() -> None:
    """A barrier that sleeps: where ranks outnumber cores, those that wait in MPI slow down those still at work."""
    from mpi4py import MPI

    request = MPI.COMM_WORLD.Ibarrier()
    while not request.Test():
        time.sleep(0.01)


if __name__ == "__main__":
    main()
