"""Runs that are killed while they save, at every place and at any moment: what there is afterwards, and how it goes on.

Such a run must find a checkpoint that holds, bit for bit, what an undisturbed run had at that step; go on from it; end
with the same weights; and leave nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from hpcmp.checkpoint import Slab, directory, manifest, open_checkpoint
from hpcmp.errors import CheckpointError
from hpcmp.training.config import load_config
from hpcmp.training.engine import Result
from hpcmp.training.trainer import Trainer
from tests.corpus import config, corpus
from tests.harness import launch

if TYPE_CHECKING:
    from mpi4py import MPI

STEPS = 5
PHASES = ["create", "write", "fsync", "digest", "manifest", "rename", "pointer", "prune"]
OF_RANK_0 = ("manifest", "rename", "pointer")
BEHIND = "checkpoint.asynchronous=true"
ANY = "some moment"
NOBODY = "::"


class Victim(Trainer):
    """A run that notes what is committed after each step, and dies in the save of step ``last``, if it says where."""

    def __iter__(self) -> Iterator[Result]:
        where, last, log = os.environ.get("VICTIM", NOBODY).rsplit(":", 2)
        if log:
            self._after(where, last, log)
        for result in super().__iter__():
            if log:
                self._after(where, last, log)
            yield result

    def _after(self, where: str, last: str, log: str) -> None:
        if self.logs:
            try:
                name, _ = directory.pointed(self.checkpoints)
            except OSError:
                name = directory.step_name(0)
            with open(log, "a") as stream:
                stream.write(f"{int(name.removeprefix('step_'))} {time.time()}\n")
        if str(self.step + 1) == last:
            os.environ["HPCMP_FAILPOINT"] = where


def train(arguments: list[str], comm: MPI.Intracomm | None) -> None:
    """A run as ``arguments`` say: the file and what is set besides."""
    with Victim(load_config(Path(arguments[0]), arguments[1:]), comm) as trainer:
        trainer.train()


class Kills:
    """Runs of ``ranks`` ranks in ``folder`` that are killed and go on."""

    def __init__(self, ranks: int, settings: list[str], folder: Path) -> None:
        self.ranks, self.settings, self.folder, self.log = ranks, settings, folder, folder / "log"
        self.toml = config(folder, corpus(folder))
        assert self._run("undisturbed", "checkpoint.keep=99", victim=f":0:{self.log}") == 0
        times = [moment for _, moment in self._log()]
        self.seconds = times[-1] - times[0]
        self.whole = folder / "undisturbed" / "checkpoints"
        names = {step: directory.step_name(step) for step in range(1, STEPS + 1)}
        self.expected = {step: contents(self.whole / name) for step, name in names.items()}

    def kill(self, where: str, step: int, draw: Random) -> tuple[bool, str]:
        """Kill a run at ``where`` in the save of ``step``, or at "some moment", and go on: whether it was killed before
        its end, and what is wrong, or ""."""
        shutil.rmtree(self.folder / "killed", ignore_errors=True)
        self.log.unlink(missing_ok=True)
        root, first = self.folder / "killed" / "checkpoints", directory.step_name(1)
        shutil.copytree(self.whole / first, root / first)
        directory.point(root, first, hashlib.sha256((root / first / manifest.NAME).read_bytes()).hexdigest())
        killed = self._run("killed", victim=f"{where}:{step}:{self.log}", draw=draw) != 0
        return killed, self._judged(root, where, step)

    def _judged(self, root: Path, where: str, step: int) -> str:
        committed = max((step for step, _ in self._log()), default=0)
        try:
            found = open_checkpoint(root)
        except CheckpointError as error:
            return f"NOTHING TO LOAD: {error}"
        if found.verify() or contents(found.path) != self.expected[found.step]:
            return f"WRONG: step {found.step} is not as it was saved"
        if found.step < committed:
            return f"LOST: step {found.step} instead of {committed}"
        if where != ANY and BEHIND not in self.settings and found.step != step - 1 + where.startswith("prune"):
            return f"step {found.step} after a death in the save of {step}"
        if self._run("killed"):
            return "NOT RESUMED"
        if contents(root / directory.step_name(STEPS)) != self.expected[STEPS]:
            return "WRONG: not the same in the end"
        left = [path.name for path in root.iterdir() if path.name.startswith((".step", ".latest"))]
        return f"left behind: {left}" if left else ""

    def _log(self) -> list[tuple[int, float]]:
        """(what was committed, when it was looked up) after each step of the run."""
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return [(int(step), float(moment)) for step, moment in lines]

    def _run(self, name: str, *settings: str, victim: str = "", draw: Random | None = None) -> int:
        """Run to the end or to death: 0 if it got to the end."""
        given = [f"run.directory={self.folder / name}", f"train.steps={STEPS}", "checkpoint.every=1"]
        arguments = [str(self.toml), *given, *self.settings, *settings]
        moment = draw.uniform(0, self.seconds) if draw and victim.startswith(ANY) else None
        if self.ranks == 1:
            child = os.fork()
            if child == 0:
                self._alone(arguments, victim)
            self._strike(moment, lambda: os.kill(child, signal.SIGKILL))
            return os.waitpid(child, 0)[1]
        argv = [sys.executable, "-m", "tests.checkpoint.campaign", "train", *arguments]
        with tempfile.TemporaryDirectory(prefix="hpcmp-ranks-", ignore_cleanup_errors=True) as temporary:
            environment = {"VICTIM": victim} if victim else {}
            process = launch.start(self.ranks, argv, Path(temporary), environment, launch.ROOT)
            try:
                self._strike(moment, lambda: _kill_some(process.pid, draw or Random()))
                return process.wait(120)
            except subprocess.TimeoutExpired:
                return -1
            finally:
                launch.end(process)

    def _alone(self, arguments: list[str], victim: str) -> None:
        """The child that is a run of one rank: never returns."""
        code = 1
        try:
            os.environ["VICTIM"] = victim or NOBODY
            train(arguments, None)
            code = 0
        finally:
            os._exit(code)

    def _strike(self, moment: float | None, kill: Callable[[], object]) -> None:
        """Kill so many seconds after the run has begun to step."""
        if moment is None:
            return
        end = time.monotonic() + 60
        while not self.log.exists() and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(moment)
        kill()


def _kill_some(leader: int, draw: Random) -> None:
    """Kill one rank of a job, or all at once."""
    ranks = [pid for pid in launch._session(leader) if _is_rank(pid)]
    for pid in ranks if draw.random() < 0.5 else ranks[:1] and [draw.choice(ranks)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _is_rank(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"python" in words[0] and b"tests.checkpoint.campaign" in words


def contents(step: Path) -> str:
    """A digest of all that a checkpoint holds and that a run goes on from."""
    found, digest = open_checkpoint(step), hashlib.sha256()
    kinds = sorted(found.tensors.items())
    slabs = [Slab(name, shape, tuple(slice(0, n) for n in shape), np.empty(shape, t)) for name, (shape, t) in kinds]
    found.load(slabs)
    for slab in slabs:
        digest.update(f"{slab.name} {slab.shape} {slab.data.dtype}".encode() + slab.data.tobytes())
    state = [found.state.get(key) for key in ("sampler", "optimizer_steps", "loss_scale")]
    digest.update(json.dumps(state, sort_keys=True).encode())
    return digest.hexdigest()


def kills(count: int, seed: int, ranks: int, settings: list[str], folder: Path) -> tuple[Counter[str], list[str]]:
    """Kill ``count`` runs in every phase of a save, on rank 0, another and all, and at any moment in between."""
    draw, trial = Random(f"kills {seed}"), Kills(ranks, settings, folder)
    phases = PHASES + (["snapshot"] if BEHIND in settings else [])
    spots = [
        f"{phase}:{rank}"
        for phase in phases
        for rank in (0, 1, "all")
        if rank == 0 or (ranks > 1 and phase not in OF_RANK_0)
    ]
    counts, wrong = Counter[str](), []
    for i in range(count):
        where = ANY if i % 3 == 2 else spots[(i - i // 3) % len(spots)]
        step = draw.randrange(2, STEPS)
        killed, problem = trial.kill(where, step, draw)
        counts[where if killed else f"{where}, too late"] += 1
        if problem or not (killed or where == ANY):
            wrong.append(f"{i}: {where}, step {step}: {problem or 'it was not killed'}")
    return counts, wrong
