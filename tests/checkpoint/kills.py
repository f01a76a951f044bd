"""Runs that are killed while they save, at every place and at any moment: what there is afterwards, and how it goes on.

One run has as many lives as it takes: each goes on from where the one before was killed, saves at least once, and is
killed in turn; at the run's end another begins. After each death the newest checkpoint, and each that is complete, must
hold, bit for bit, what an undisturbed run had at that step; none that was committed may be lost; the next life must go
on from it; and nothing may be there that an earlier life left behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from hpcmp.checkpoint import Slab, checkpoints, directory, open_checkpoint
from hpcmp.errors import CheckpointError
from hpcmp.training.config import load_config
from hpcmp.training.engine import Result
from hpcmp.training.trainer import Trainer
from tests.corpus import config, corpus
from tests.harness import launch

if TYPE_CHECKING:
    from mpi4py import MPI

STEPS = 40  # of the run
SMALL = ["model.layers=2", "model.sequence=12", "run.evaluate_every=none", "checkpoint.every=1"]
PHASES = ["create", "write", "fsync", "digest", "manifest", "rename", "pointer", "prune"]
OF_RANK_0 = ("manifest", "rename", "pointer")
BEHIND = "checkpoint.asynchronous=true"
ANY = "some moment"
NOBODY = "::"
PATIENCE = 600.0  # seconds that a life may take, on a machine that has much else to do
EVERY = 25  # kills: a line


class Victim(Trainer):
    """A run that notes what is committed before and after each step, and dies in the save of step ``last``, if
    VICTIM, which is where:last:log, says so."""

    def __iter__(self) -> Iterator[Result]:
        where, last, log = os.environ.get("VICTIM", NOBODY).rsplit(":", 2)
        if log:
            self._note(where, last, log)
        for result in super().__iter__():
            if log:
                self._note(where, last, log)
            yield result

    def _note(self, where: str, last: str, log: str) -> None:
        if self.logs:
            try:
                name, _ = directory.pointed(self.checkpoints)
            except OSError:
                name = directory.step_name(0)
            with open(log, "a") as stream:
                stream.write(f"{self.step} {int(name.removeprefix('step_'))} {time.monotonic()}\n")
        if str(self.step + 1) == last:
            os.environ["HPCMP_FAILPOINT"] = where


def train(arguments: list[str], comm: MPI.Intracomm | None) -> None:
    """A run as ``arguments`` say: the file and what is set besides."""
    with Victim(load_config(Path(arguments[0]), arguments[1:]), comm) as trainer:
        trainer.train()


class Kills:
    """A run of ``ranks`` ranks in ``folder`` that is killed and goes on, again and again."""

    def __init__(self, ranks: int, settings: list[str], folder: Path, steps: int = STEPS) -> None:
        self.ranks, self.settings, self.folder, self.log = ranks, settings, folder, folder / "log"
        self.toml, self.steps = config(folder, corpus(folder)), steps
        self.root = folder / "killed" / "checkpoints"
        if ranks == 1:  # in this process: its children have the kernels then
            train(self._arguments("undisturbed", "checkpoint.keep=1000"), None)
        else:
            assert self._run("undisturbed", "checkpoint.keep=1000") == 0
        names = {step: directory.step_name(step) for step in range(1, steps + 1)}
        undisturbed = folder / "undisturbed" / "checkpoints"
        self.expected = {step: contents(undisturbed / name) for step, name in names.items()}
        shutil.rmtree(undisturbed)
        self._begin()

    def _begin(self) -> None:
        shutil.rmtree(self.folder / "killed", ignore_errors=True)
        self.step, self.whole = 0, {0}  # where the next life goes on, or from a later one that is whole
        self.left = set[str]()  # what the last one left behind

    def kill(self, where: str, draw: Random) -> tuple[bool, str]:
        """One life, to a death at ``where`` in some save but its first, or at "some moment" after its first step:
        whether it was killed before the run's end, and what is wrong, or ""."""
        if max(self.whole) > self.steps - 4:
            self._begin()
        self.log.unlink(missing_ok=True)
        last = max(self.whole) + draw.choice((2, 3))
        seconds = draw.choice((0.02, 0.2, 1.0)) * draw.random() if where == ANY else None
        killed = self._run("killed", victim=f"{where}:{last}:{self.log}", seconds=seconds, draw=draw) != 0
        problem = self._judged(where, last if killed else self.steps + 1)
        if problem or not killed:
            self._begin()
        return killed, problem

    def _judged(self, where: str, last: int) -> str:
        notes = [line.split() for line in self.log.read_text().splitlines() if line.count(" ") == 2]
        began, reached, committed = int(notes[0][0]), int(notes[-1][0]), max(int(step) for _, step, _ in notes)
        if began < self.step or began not in self.whole:
            return f"NOT RESUMED: went on from step {began} instead of {self.step}"
        if where != ANY and reached != last - 1:
            return f"ENDED BY ITSELF: after step {reached}"
        try:
            found = open_checkpoint(self.root)
        except CheckpointError as error:
            return f"NOTHING TO LOAD: {error}" if where != ANY or committed else ""
        if found.step < committed:
            return f"LOST: step {found.step} instead of {committed}"
        if where != ANY and BEHIND not in self.settings and found.step != last - 1 + where.startswith("prune"):
            return f"step {found.step} after a death in the save of {last}"
        whole = {found.step}
        for path in checkpoints(self.root):
            try:
                this = open_checkpoint(path)
            except CheckpointError as error:
                return f"HALF A CHECKPOINT: {error}"
            if this.verify() or contents(path) != self.expected[this.step]:
                return f"WRONG: step {this.step} is not as it was saved"
            whole.add(this.step)
        hidden = {path.name for path in self.root.iterdir() if path.name.startswith((".step", ".latest"))}
        if stale := hidden & self.left if found.step > began else set():
            return f"left behind by an earlier life: {sorted(stale)}"
        self.step, self.whole, self.left = found.step, whole, hidden
        return ""

    def _arguments(self, name: str, *settings: str) -> list[str]:
        given = [f"run.directory={self.folder / name}", f"train.steps={self.steps}", *SMALL]
        return [str(self.toml), *given, *self.settings, *settings]

    def _run(
        self, name: str, *settings: str, victim: str = "", seconds: float | None = None, draw: Random | None = None
    ) -> int:
        """Run to the end, or to death, at the latest so many seconds after the first step: 0 if it got to the end."""
        arguments = self._arguments(name, *settings)
        if self.ranks == 1:
            child = os.fork()
            if child == 0:
                self._alone(arguments, victim)
            status: list[int] = []

            def over() -> bool:
                pid, code = (0, 0) if status else os.waitpid(child, os.WNOHANG)
                status.extend([code] if pid else [])
                return bool(status)

            self._until(over, seconds, lambda: os.kill(child, signal.SIGKILL))
            return status[0]
        argv = [sys.executable, "-m", "tests.checkpoint.campaign", "train", *arguments]
        with tempfile.TemporaryDirectory(prefix="hpcmp-ranks-", ignore_cleanup_errors=True) as temporary:
            environment = {"HPCMP_KERNELS": "reference"} | ({"VICTIM": victim} if victim else {})  # they load faster
            process = launch.start(self.ranks, argv, Path(temporary), environment, launch.ROOT)
            try:
                strike = lambda: _kill_some(process.pid, draw or Random())  # noqa: E731
                self._until(lambda: process.poll() is not None, seconds, strike)
                text = (Path(temporary) / "stderr").read_text(errors="replace")
                if "Traceback" in text:
                    sys.stderr.write(text)
                return process.wait()
            finally:
                launch.end(process)

    def _alone(self, arguments: list[str], victim: str) -> None:
        """The child that is a run of one rank: never returns."""
        code = 1
        try:
            os.environ["VICTIM"] = victim or NOBODY
            train(arguments, None)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _until(self, over: Callable[[], bool], seconds: float | None, kill: Callable[[], object]) -> None:
        """Wait until it is over; ``kill`` so many seconds after the first step."""
        end, moment = time.monotonic() + PATIENCE, None
        while not over():
            if seconds is not None and moment is None and self.log.exists() and self.log.read_text().count("\n") > 1:
                moment = time.monotonic() + seconds
            if moment is not None and time.monotonic() >= moment:
                kill()
                seconds = moment = None
            if time.monotonic() > end:
                kill()
                raise TimeoutError(f"a run did not end within {PATIENCE:g} s")
            time.sleep(0.002)


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


def kills(
    count: int,
    seed: int,
    ranks: int,
    settings: list[str],
    folder: Path,
    steps: int = STEPS,
    tell: Callable[[str], object] = lambda line: None,
) -> tuple[Counter[str], list[str]]:
    """Kill ``count`` lives in every phase of a save, on rank 0, another and all, and at any moment in between: how
    many died where, and what was wrong. ``tell`` is told every EVERY kills how things stand."""
    draw, trial = Random(f"kills {seed}"), Kills(ranks, settings, folder, steps)
    phases = PHASES + (["snapshot"] if BEHIND in settings else [])
    spots = [
        f"{phase}:{rank}"
        for phase in phases
        for rank in (0, 1, "all")
        if rank == 0 or (ranks > 1 and phase not in OF_RANK_0)
    ]
    counts, wrong = Counter[str](), []
    start = time.monotonic()
    for i in range(count):
        where = ANY if i % 3 == 2 else spots[(i - i // 3) % len(spots)]
        killed, problem = trial.kill(where, draw)
        counts[where if killed else f"{where}, too late"] += 1
        if problem or not (killed or where == ANY):
            wrong.append(f"{i}: {where}: {problem or 'it was not killed'}")
        if (i + 1) % EVERY == 0 and i + 1 < count:
            tell(f"{i + 1} kills, {i + 1 - len(wrong)} good, {time.monotonic() - start:.0f} s")
    return counts, wrong
