"""Jobs of a Slurm that tests have to themselves: how they are submitted and waited for, and what they left."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SLURMBOX = Path(__file__).with_name("slurmbox")
ENDED = frozenset("BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY TIMEOUT".split())

CONFIG = """\
[model]
layers = 2
hidden = 16
heads = 4
sequence = 24
[data]
path = "{data}"
[train]
steps = 60
batch = 12
kernels = "reference"   # nothing to compile
[layout]
tp = 2
[checkpoint]
every = 10
[run]
directory = "{run}"
log_seconds = 0
"""

SITE = """\
[batch]
warning = 20            # of Slurm's granularity more, up to 50
options = "{options}"
[launch]
launcher = "{launcher}"
mpi = "{mpi}"
bind = "none"
"""

Line = dict[str, Any]  # of a journal, see paced.py


def command(*words: str | Path, timeout: float = 60.0, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a command; its output and exit code."""
    argv = list(map(str, words))
    return subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=timeout, **more)


def until(found: Callable[[], Any], seconds: float, what: str) -> Any:
    """What ``found`` gives, asked again until it is true."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}"
        time.sleep(0.25)
    return value


@dataclass(frozen=True)
class Job:
    """A job by its id (``12_3`` in an array), the folder where it was submitted, and in it that of its run."""

    folder: Path
    id: str
    run: str = "run"

    def facts(self) -> dict[str, str]:
        """What ``scontrol`` says of it."""
        text = command("scontrol", "show", "job", "-o", self.id).stdout
        return dict(re.findall(r"(\w+)=(\S*)", text))

    @property
    def state(self) -> str:
        return self.facts().get("JobState", "")

    def wait(self, seconds: float = 120.0) -> str:
        """Wait for its end; its last state."""
        try:
            until(lambda: self.state in ENDED, seconds, f"the end of job {self.id}")
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {self.facts()}\n{self.output}") from None
        return self.state

    @property
    def code(self) -> int:
        """The exit code of its script."""
        return int(self.facts()["ExitCode"].partition(":")[0])

    @property
    def output(self) -> str:
        """What the job, all attempts of it, has written to stdout and stderr."""
        return "".join(path.read_text(errors="replace") for path in self.folder.glob(f"*-{self.id}.out"))

    @property
    def metrics(self) -> list[Line]:
        """The lines of the run's metrics that are about steps, in the order in which they were written."""
        lines = (self.folder / self.run / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if "loss" in line]

    @property
    def losses(self) -> list[float]:
        """The loss of every step of the run."""
        metrics = self.metrics
        assert [line["step"] for line in metrics] == list(range(len(metrics))), "a step is missing, or there twice"
        return [line["loss"] for line in metrics]

    def journal(self, rank: int = 0) -> list[Line]:
        """What ``paced`` has written on a rank, as yet."""
        path = self.folder / self.run / f"rank{rank}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def at_step(self, step: int, seconds: float = 90.0) -> Line:
        """Wait until a step is done; the line about the last one that is."""
        try:
            until(lambda: self._has_done(step), seconds, f"step {step}")
        except AssertionError as error:
            raise AssertionError(f"{error}; job {self.id} is {self.state}\n{self.output}") from None
        return self.journal()[-1]

    def _has_done(self, step: int) -> bool:
        assert self.state not in ENDED, "it has ended"
        return any(line["step"] >= step for line in self.journal())

    @property
    def attempts(self) -> list[list[Line]]:
        """The lines of rank 0, by the process that wrote them."""
        found: dict[tuple[str, int], list[Line]] = {}
        for line in self.journal():
            found.setdefault((line["host"], line["pid"]), []).append(line)
        return list(found.values())

    @property
    def repeated(self) -> int:
        """How many steps the second attempt had to take again."""
        before, after = self.attempts[:2]
        return int(before[-1]["step"] + 1 - after[0]["step"])

    @property
    def cost(self) -> str:
        """What came between the first two attempts: from the last step of one to the first of the other."""
        before, after = self.attempts[:2]
        again = f"{self.repeated} steps again" if self.repeated else "no step again"
        return f"no step for {after[0]['time'] - before[-1]['time']:.1f} s, {again}"


class Cluster:
    """The Slurm that SLURM_CONF names, for runs of a tiny model on ``data`` whose folders lie in ``folder``."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self.submitted: list[str] = []
        self.options = ""  # of sbatch, for the jobs to come

    @cached_property
    def programs(self) -> Path:
        """A folder whose ``hpcmp`` is ``paced``."""
        folder = self.folder / "bin"
        folder.mkdir()
        (folder / "hpcmp").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tests.cluster.paced "$@"\n')
        (folder / "hpcmp").chmod(0o755)
        return folder

    def run(self, name: str, launcher: str = "srun", mpi: str = "pmix") -> Path:
        """The folder of a new run, with its configuration ``run.toml`` and the site's ``site.toml``."""
        folder = self.folder / name
        folder.mkdir()
        (folder / "run.toml").write_text(CONFIG.format(data=self.data, run=folder / "run"))
        (folder / "site.toml").write_text(SITE.format(launcher=launcher, mpi=mpi, options=self.options))
        return folder

    def environment(self, pace: float) -> dict[str, str]:
        """Of a job: this one's, with the programs of this Python and ``paced``."""
        path = os.pathsep.join([str(self.programs), f"{sys.prefix}/bin", os.environ["PATH"]])
        return dict(os.environ) | {"PATH": path, "PYTHONPATH": str(ROOT), "HPCMP_PACE": str(pace)}

    def write(self, folder: Path, *words: str, nodes: int = 2, minutes: int = 5, pace: float = 0.0) -> dict[str, Any]:
        """``hpcmp job`` in a run's folder, with two ranks on each node; its result."""
        first = sys.executable, "-m", "hpcmp", "job", "run.toml", "--json", "--scheduler=slurm", "--site=site.toml"
        words += "--ranks-per-node=2", f"--nodes={nodes}", f"--time={minutes}"
        done = command(*first, *words, env=self.environment(pace), cwd=folder)
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        self.submitted += result["ids"]
        return result

    def job(
        self,
        name: str,
        *options: str,
        nodes: int = 2,
        minutes: int = 5,
        pace: float = 0.0,
        launcher: str = "srun",
        mpi: str = "pmix",
        overrides: Sequence[str] = (),
    ) -> Job:
        """Submit a new run, with more options for sbatch."""
        folder = self.run(name, launcher, mpi)
        script = self.write(folder, *overrides, nodes=nodes, minutes=minutes)["script"]
        done = command("sbatch", "--parsable", *options, script, env=self.environment(pace), cwd=folder)
        assert done.returncode == 0, done.stderr
        self.submitted.append(done.stdout.strip())
        return Job(folder, done.stdout.strip())

    def close(self) -> None:
        """Cancel what still runs."""
        command("scancel", *self.submitted)
