"""A pytest plugin that runs the tests marked ``mpi`` on several ranks, one job for each number of ranks.

Collected as usual, so that ``-k``, paths and ``-x`` work, a test ``t`` becomes ``t@1``, ``t@2`` and so on: the same
test on that many ranks under ``mpirun``, reported as one. A test that fails on all ranks alike leaves the job running;
after any other failure the job is ended and the remaining tests go on in a new one.

The numbers of ranks are 1, 2, 3, 4 and 8, and those that tests marked ``mpi(size=N)`` ask for; where HPCMP_TEST_RANKS
is given, those in it alone.

Those that are marked ``mpio`` as well are run on at most 4 ranks, by an interpreter whose h5py is built with MPI
(``mpio.py``), and skipped where there is none; the summary says why.

Under ``--with-mpi`` or ``--only-mpi`` (pytest-mpi) this process is itself a rank, and the plugin does nothing.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

from . import mpio
from .job import Job, Verdict

COUNTS = os.environ.get("HPCMP_TEST_RANKS")


class Ranks:
    """The tests to run on one number of ranks by one interpreter, and the job that runs them."""

    def __init__(self, number: int, items: list[pytest.Item], config: pytest.Config, python: str) -> None:
        self.number, self.python = number, python
        self.tests = [item.nodeid for item in items]
        self.files = [str(item.path) for item in items]
        self.options = [f"--rootdir={config.rootpath}", f"--tb={config.option.tbstyle}"]
        if config.inipath:
            self.options += ["-c", str(config.inipath)]
        self.job: Job | None = None
        self.refused = False

    def run(self, test: str, limit: float) -> Verdict:
        """Run ``test``, in the job that the tests before it left if that is still sound."""
        if self.refused:
            return Verdict("failed", f"the job on {self.number} ranks does not start (see the first failure)")
        if self.job is None:
            tests = self.tests[self.tests.index(test) :]
            self.job = Job(self.number, tests, self.files, self.options, self.python)
            verdict = self.job.started()
            if not verdict.usable:
                self.refused = True
                self.close()
                return verdict
        verdict = self.job.result(test, limit)
        if not verdict.usable or test == self.tests[-1]:
            self.close()
        return verdict

    def close(self) -> None:
        if self.job is not None:
            self.job.close()
            self.job = None


class RanksFailure(Exception):
    """A test failed on some rank; the message is the whole report."""


class RankedTest(pytest.Item):
    """One test on one number of ranks."""

    def __init__(self, *, original: pytest.Item, ranks: Ranks, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.original, self.ranks = original, ranks
        self.limit = float("inf")
        self.own_markers += [mark for mark in original.own_markers if mark.name == "timeout"]
        if original.get_closest_marker("mpio"):
            self.add_marker("mpio")

    def runtest(self) -> None:
        if not self.ranks.python:
            mpio.python()  # which skips
        verdict = self.ranks.run(self.original.nodeid, self.limit)
        if verdict.outcome == "skipped":
            pytest.skip(verdict.text.removeprefix("Skipped: "))
        if verdict.outcome == "failed":
            raise RanksFailure(verdict.text)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        return str(excinfo.value) if isinstance(excinfo.value, RanksFailure) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[os.PathLike[str] | str, int | None, str]:
        path, line, _ = self.original.reportinfo()
        return path, line, self.name


def pytest_configure(config: pytest.Config) -> None:
    """A program that uses Open MPI without mpirun leaves 16 MB in /dev/shm: have serial tests leave it in a folder.

    Compiled modules are kept, whatever the environment says: tests start some thousand processes, which would each
    compile all that they import.
    """
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if not _is_rank(config) and "OMPI_MCA_btl_sm_backing_directory" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="hpcmp-alone-", ignore_cleanup_errors=True)
        os.environ["OMPI_MCA_btl_sm_backing_directory"] = folder.name
        config.add_cleanup(folder.cleanup)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Tests and their modules stay to the end: the garbage collector need not look at them, now or ever."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put in place of each test marked ``mpi``, after the serial tests, one for each number of ranks that it allows."""
    ranked = [item for item in items if item.get_closest_marker("mpi")]
    if not ranked or _is_rank(config):
        return
    try:
        given = {int(count) for count in (COUNTS or "1,2,3,4,8").split(",")}
    except ValueError:
        raise pytest.UsageError(f"HPCMP_TEST_RANKS is {COUNTS!r}: it takes numbers of ranks, such as 1,2,4") from None
    wanted = {item.nodeid: _wanted(item, given) for item in ranked}
    items[:] = [item for item in items if item not in ranked]
    serial = len(items)
    for by_mpio in (False, True):
        python = (mpio.find()[0] if by_mpio else sys.executable) or ""
        some = [item for item in ranked if bool(item.get_closest_marker("mpio")) is by_mpio]
        for number in sorted(set().union(*(wanted[item.nodeid] for item in some))):
            fitting = [item for item in some if number in wanted[item.nodeid]]
            ranks = Ranks(number, fitting, config, python)
            config.add_cleanup(ranks.close)
            for item in fitting:
                assert item.parent is not None
                name = f"{item.name}@{number}"
                items.append(RankedTest.from_parent(item.parent, name=name, original=item, ranks=ranks))
    if len(items) == serial:
        raise pytest.UsageError(f"no multi-rank test can run: all need more ranks than HPCMP_TEST_RANKS={COUNTS}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A serial test marked ``mpio`` has a program of its own to launch."""
    if item.get_closest_marker("mpio") and not isinstance(item, RankedTest) and not _is_rank(item.config):
        mpio.python()


def _is_rank(config: pytest.Config) -> bool:
    return bool(config.getoption("with_mpi") or config.getoption("only_mpi"))


def _wanted(item: pytest.Item, given: set[int]) -> set[int]:
    """The numbers of ranks that a test marked ``mpi`` runs on: with ``size=N`` N alone, else of those given, with
    ``min_size=N``, at least N."""
    marks = [mark.kwargs for mark in item.iter_markers("mpi")]
    if exact := {mark["size"] for mark in marks if "size" in mark}:
        return exact & given if COUNTS else exact
    if item.get_closest_marker("mpio"):
        given = given & mpio.RANKS
    return {number for number in given if all(number >= mark.get("min_size", 1) for mark in marks)}


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool | None:
    """Take over pytest-timeout's limit for a ranked test: it counts once the job has started, and shows the hang."""
    if not isinstance(item, RankedTest):
        return None
    item.limit = settings.timeout
    return True


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many tests ran on each number of ranks, and how many with parallel HDF5 or why none."""
    counts: dict[int, Counter[str]] = {}
    parallel: Counter[str] = Counter()
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.getreports(outcome):
            parallel[outcome] += "mpio" in report.keywords
            number = report.nodeid.rpartition("@")[2]
            if number.isdigit():
                counts.setdefault(int(number), Counter())[outcome] += 1
    if counts:
        terminalreporter.section("multi-rank tests")
    for number, outcomes in sorted(counts.items()):
        told = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
        terminalreporter.write_line(f"{number} rank{'s' * (number > 1)}: {told}")
    if told := ", ".join(f"{count} {outcome}" for outcome, count in parallel.items() if count):
        why = mpio.find()[1]
        terminalreporter.write_line(f"mpio: {told}{f': {why}' if why else ''}")
