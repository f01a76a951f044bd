"""A job that runs multi-rank tests, seen from outside: each test's outcome, and why when ranks fail, die or hang."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import launch
from .rank import SIGNAL

START = 120.0  # seconds that a job may take to start and to collect its tests
GRACE = 2.0  # seconds that the other ranks have once a rank has failed
FINISH = 60.0  # seconds from the last test to the end of the job

Record = dict[str, Any]


class Verdict(NamedTuple):
    """What became of a test on all ranks together."""

    outcome: str  # passed, failed or skipped
    text: str = ""
    usable: bool = True  # the ranks are in step, so the job can go on to the next test


class Job:
    """``mpirun -n ranks python -m tests.harness.rank`` for the node ids ``tests``, which lie in ``files``."""

    def __init__(
        self,
        ranks: int,
        tests: Sequence[str],
        files: Iterable[str],
        options: Iterable[str],
        python: str = sys.executable,
    ) -> None:
        self.ranks, self.tests = ranks, list(tests)
        self.records: list[dict[str, Record]] = [{} for _ in range(ranks)]
        self.temporary = tempfile.TemporaryDirectory(prefix="hpcmp-ranks-", ignore_cleanup_errors=True)
        self.directory = Path(self.temporary.name)
        (self.directory / "tests.json").write_text(json.dumps({"tests": self.tests, "files": sorted(set(files))}))
        self.offsets = [0] * ranks
        argv = [python, "-m", "tests.harness.rank", str(self.directory), *options]
        path = os.pathsep.join(filter(None, [str(launch.ROOT), os.environ.get("PYTHONPATH")]))
        self.process = launch.start(ranks, argv, self.directory, env={"PYTHONPATH": path})

    def started(self) -> Verdict:
        """Wait until every rank has collected the tests; fails if one has not, or if mpirun made worlds of size 1."""
        self._wait("ready", START)
        sizes = {records["start"]["size"] for records in self.records if "start" in records}
        if self.ranks > 1 and sizes == {1}:
            text = f"mpirun -n {self.ranks} made {self.ranks} worlds of size 1: it is not of the MPI that mpi4py uses"
            return Verdict("failed", text, usable=False)
        if any("ready" not in records for records in self.records):
            return Verdict("failed", self._why("ready", START), usable=False)
        return Verdict("passed")

    def result(self, test: str, limit: float) -> Verdict:
        """Wait, at most ``limit`` seconds, until every rank has run ``test``."""
        self._wait(test, limit)
        found = [records[test] for records in self.records if test in records]
        failed = [record for record in found if record["outcome"] == "failed"]
        if failed or len(found) < self.ranks:
            in_step = len(failed) == self.ranks and len({_what(record) for record in failed}) == 1
            verdict = Verdict("failed", self._why(test, limit), usable=in_step)
            (self.directory / f"go{self.tests.index(test)}").touch()
        elif all(record["outcome"] == "skipped" for record in found):
            verdict = Verdict("skipped", found[0]["text"])
        else:
            verdict = Verdict("passed")
        if verdict.usable and test == self.tests[-1] and (text := self._unfinished()):
            verdict = Verdict("failed", "\n".join(filter(None, [verdict.text, text])), usable=False)
        return verdict

    def close(self) -> None:
        """End every process of the job and remove its files."""
        launch.end(self.process)
        self.temporary.cleanup()

    def _read(self) -> None:
        for rank, records in enumerate(self.records):
            path = self.directory / f"rank{rank}.jsonl"
            if path.exists():
                with path.open("rb") as stream:
                    stream.seek(self.offsets[rank])
                    lines = stream.read().rpartition(b"\n")[0]
                self.offsets[rank] += len(lines) + 1 if lines else 0
                for record in map(json.loads, lines.splitlines()):
                    records.setdefault(record.get("test") or record["event"], record)

    def _wait(self, key: str, limit: float) -> None:
        """Until every rank has a record of ``key``, the job has ended, or time is up (``GRACE`` after a failure)."""
        deadline, graced = time.monotonic() + limit, False
        while True:
            ended = self.process.poll() is not None  # asked before the last read, so that no record is missed
            self._read()
            found = [records[key] for records in self.records if key in records]
            if len(found) == self.ranks or ended or time.monotonic() > deadline:
                return
            if not graced and any(record.get("outcome") == "failed" for record in found):
                deadline, graced = min(deadline, time.monotonic() + GRACE), True
            time.sleep(0.01)

    def _why(self, key: str, limit: float) -> str:
        """The failed ranks' tracebacks first, then where the ranks are that are silent, or what they left behind."""
        records = {rank: records[key] for rank, records in enumerate(self.records) if key in records}
        failed = {rank: record for rank, record in records.items() if record.get("outcome") == "failed"}
        silent = [rank for rank in range(self.ranks) if rank not in records]
        parts = []
        if failed:
            first = min(failed, key=lambda rank: failed[rank]["time"])
            same = [rank for rank, record in failed.items() if _what(record) == _what(failed[first])]
            parts.append(f"{self._names(same)}: {failed[first]['summary']}\n\n{failed[first]['text']}\n")
            parts += [f"rank {rank}: {_what(record)}" for rank, record in failed.items() if rank not in same]
        if silent and self.process.poll() is not None:
            parts += self._remains(silent)
        elif silent:
            patience = f"{GRACE:g} s later" if failed else f"within {limit:g} s"
            parts += [f"{self._names(silent)}: no answer {patience}; now at", *self._stacks(silent)]
        return "\n".join(parts)

    def _unfinished(self) -> str:
        """Why the job has not ended, after its last test, as it should; empty if it has."""
        everyone = list(range(self.ranks))
        try:
            status = self.process.wait(FINISH)
        except subprocess.TimeoutExpired:
            reason = f"after the last test, the ranks did not end within {FINISH:g} s; now at"
            return "\n".join([reason, *self._stacks(everyone)])
        return "\n".join(["after the last test:", *self._remains(everyone)]) if status else ""

    def _names(self, ranks: Sequence[int]) -> str:
        if len(ranks) == self.ranks:
            return f"every rank of {self.ranks}" if self.ranks > 1 else "the only rank"
        return f"rank {', '.join(map(str, ranks))} of {self.ranks}"

    def _remains(self, ranks: Sequence[int]) -> list[str]:
        """What ranks that ended left: the stacks of those that crashed, the ends of the logs, and mpirun's words."""
        stacks = {rank: text for rank in ranks if "Fatal" in (text := self._text(f"rank{rank}.stack"))}
        if stacks:
            headline = f"{self._names(list(stacks))} crashed: {next(iter(stacks.values())).splitlines()[0]}"
        else:
            headline = f"{self._names(ranks)} ended without a result, mpirun with status {self.process.returncode}"
        texts = {f"rank {rank}": _own_frames(stack) for rank, stack in stacks.items()}
        texts |= {f"rank {rank}, log": self._tail(f"rank{rank}.log") for rank in stacks or ranks}
        texts |= {"mpirun": self._tail("stdout") + self._tail("stderr")}
        return [headline, *(f"--- {whose} ---\n{text}" for whose, text in texts.items() if text)]

    def _stacks(self, ranks: Sequence[int]) -> list[str]:
        """Each rank's Python stack now: the ranks write them on a signal, even inside a blocked MPI call."""
        for rank in ranks:
            if "start" in self.records[rank]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.records[rank]["start"]["pid"], SIGNAL)
        time.sleep(0.5)
        stacks = {rank: _own_frames(self._text(f"rank{rank}.stack")) for rank in ranks}
        return [f"--- rank {rank} ---\n{stack or 'not known'}" for rank, stack in stacks.items()]

    def _text(self, name: str) -> str:
        path = self.directory / name
        return path.read_text(errors="replace").strip() if path.exists() else ""

    def _tail(self, name: str) -> str:
        return "\n".join(self._text(name).splitlines()[-40:])


def _what(failure: Record) -> str:
    """A failure's message and place, without the addresses of objects, to compare ranks by."""
    return re.sub(r"0x[0-9a-f]+", "0x...", f"{failure['summary']} ({failure['place']})")


def _own_frames(stacks: str) -> str:
    """faulthandler's stacks (most recent call first), each cut off where pytest begins."""
    kept, inside = [], True
    for line in stacks.splitlines():
        inside = inside and "/_pytest/" not in line if line.startswith("  ") else True
        if inside:
            kept.append(line)
    return "\n".join(kept).replace(f"{launch.ROOT}/", "")
