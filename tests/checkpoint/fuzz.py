"""Fuzzing of everything that reads files from elsewhere: `python -m tests.checkpoint.fuzz --inputs 100000 --seed 1`.

Good inputs are damaged at random, by bytes and by structure, and given to the reader in a process of its own, with
little memory and time. A reader may refuse an input, in one line, or read what it is; it may not crash, hang, raise
anything else, take an input for sound that was changed under its digests, or open any file outside its folder: what
Python opens is seen by an audit hook, what C opens of the files that inputs point at by inotify.

Each input is made from (seed, target, number) alone: `--only NUMBER --keep DIRECTORY` makes and reads it once more.
"""

from __future__ import annotations

import argparse
import codecs
import faulthandler
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.checkpoint.fuzz_base import Target
from tests.checkpoint.fuzz_checkpoint import Checkpoints
from tests.checkpoint.fuzz_safetensors import Safetensors
from tests.checkpoint.fuzz_tokens import Tokens
from tests.watch import Watch

TARGETS: dict[str, Callable[[], Target]] = {"checkpoint": Checkpoints, "tokens": Tokens, "safetensors": Safetensors}
BATCH = 250  # inputs of a process
MEMORY = 512 << 20  # bytes that a process may have more than at its start
SECONDS = 20  # that an input may take
FINE = ("refused", "same", "other", "not made")  # "other": what a forger wrote; "not made": HDF5 would not write it


@dataclass
class Report:
    """How many inputs of which kind had which outcome; each that was not fine: (target, number, notes, outcome)."""

    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    failures: list[tuple[str, int, str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, target: str, number: int, notes: list[str], outcome: str) -> None:
        self.counts[target, notes[0] if notes else "?", outcome.split(":")[0]] += 1
        if outcome not in FINE:
            self.failures.append((target, number, "; ".join(notes), outcome))

    def of(self, outcome: str) -> int:
        return sum(count for (_, _, found), count in self.counts.items() if found == outcome)


def fuzz(targets: list[str], inputs: int, seed: int, folder: Path) -> Report:
    """Give each target its share of the inputs."""
    report, start = Report(), time.perf_counter()
    for i, name in enumerate(targets):
        place = folder / name
        target = _prepared(name, place)
        count = inputs * (i + 1) // len(targets) - inputs * i // len(targets)
        number = 0
        while number < count:
            for done, notes, outcome in _batch(name, target, range(number, min(number + BATCH, count)), seed, place):
                report.add(name, done, notes, outcome)
            number = done + 1
    report.seconds = time.perf_counter() - start
    return report


def _prepared(name: str, folder: Path) -> Target:
    target = TARGETS[name]()
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "utf-8-sig"):
        codecs.lookup(encoding)  # of which json asks for one when it sees NULs: now, not while opening is watched
    for part in ("good", "outside"):
        (folder / part).mkdir(parents=True)
    target.prepare(folder / "good", folder / "outside")
    one(name, target, 0, 0, folder, Watch(folder / "outside"))  # all that is imported late is imported
    return target


def _batch(name: str, target: Target, numbers: range, seed: int, folder: Path) -> Iterator[tuple[int, list[str], str]]:
    """(number, notes, outcome) of ``numbers``, in a new process; if it dies, up to the input that it died of."""
    pipe, end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(pipe)
        _work(name, target, numbers, seed, folder, end)
    os.close(end)
    number, notes = numbers[0], ["?"]
    outcome = "ended"
    with open(pipe, "rb", buffering=0) as stream:
        text = b""
        while True:
            if not select.select([stream], [], [], SECONDS)[0]:
                os.kill(child, signal.SIGKILL)
                outcome = "time-out"
            if not (new := stream.read(1 << 16)):
                break
            *lines, text = (text + new).split(b"\n")
            for line in lines:
                number, notes, done = json.loads(line)
                if done:
                    yield number, notes, done
    _, status = os.waitpid(child, 0)
    if status:
        how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        yield number, notes, "time-out" if outcome == "time-out" else f"crash: {how}"


def _work(name: str, target: Target, numbers: range, seed: int, folder: Path, end: int) -> None:
    """The child: never returns."""
    code = 1
    try:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # HDF5 and h5py may grumble there
        faulthandler.disable()  # a crash is an outcome; pytest's would print it elsewhere
        with Watch(*[path for path in (folder / "outside").rglob("*") if path.is_dir()], folder / "outside") as watch:
            for number in numbers:

                def tell(notes: list[str], outcome: str, number: int = number) -> None:
                    os.write(end, json.dumps([number, notes, outcome]).encode() + b"\n")

                tell(["?"], "")
                notes, outcome = one(name, target, number, seed, folder, watch, lambda notes: tell(notes, ""))
                tell(notes, outcome)
        code = 0
    finally:
        os._exit(code)


def one(
    name: str,
    target: Target,
    number: int,
    seed: int,
    folder: Path,
    watch: Watch,
    made: Callable[[list[str]], object] = lambda notes: None,
) -> tuple[list[str], str]:
    """Make an input and read it: what was done to it, and the outcome. made: is told in between."""
    run = folder / "run"
    try:
        damage = target.damage(Random(f"{seed}:{name}:{number}"), run, folder / "outside")
    except Exception as error:
        return [f"not made, {type(error).__name__}"], "not made"
    made(damage.notes)
    watch.opened()
    with _audited(run) as opened:
        try:
            outcome = target.read(run)
        except MemoryError:
            outcome = "memory: more than there is was asked for"
        except AssertionError as error:
            outcome = f"wrong: {str(error).strip()[:200]}"
        except Exception as error:
            outcome = f"exception: {type(error).__name__}: {str(error)[:200]}"
    if escaped := opened | watch.opened():
        outcome = f"escape: {sorted(escaped)}"
    elif outcome == "other" and not damage.forged:
        outcome = "wrong: it was taken for sound"
    return damage.notes, outcome


class _audited:
    """What Python opens outside a folder while this is entered."""

    _now: _audited | None = None

    def __init__(self, folder: Path) -> None:
        self._folder, self._opened = os.path.realpath(folder) + os.sep, set[str]()

    def __enter__(self) -> set[str]:
        if not hasattr(sys, "_hpcmp_fuzz_audited"):  # a hook cannot be taken away
            sys.addaudithook(_audited._hook)
            sys._hpcmp_fuzz_audited = True  # type: ignore[attr-defined]
        _audited._now = self
        return self._opened

    def __exit__(self, *_: object) -> None:
        _audited._now = None

    @staticmethod
    def _hook(event: str, args: tuple[Any, ...]) -> None:
        now = _audited._now
        if event == "open" and now is not None and isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(args[0]))
            if not path.startswith(now._folder):
                now._opened.add(path)


def show(report: Report) -> str:
    """The report as text."""
    lines = []
    kinds = sorted({(target, kind) for target, kind, _ in report.counts})
    outcomes = sorted({outcome for _, _, outcome in report.counts}, key=lambda o: (o not in FINE, o))
    lines.append(f"{'':28}" + "".join(f"{outcome:>11}" for outcome in outcomes))
    for target, kind in kinds:
        row = "".join(f"{report.counts[target, kind, outcome]:>11,}" for outcome in outcomes)
        lines.append(f"{target + ' ' + kind:28}{row}")
    lines += [f"FAILED {target} {number}: {notes}: {outcome}" for target, number, notes, outcome in report.failures]
    lines.append(f"{report.counts.total():,} inputs in {report.seconds:.0f} s: {len(report.failures)} failures")
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=1000, help="how many, over all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="one of them (default: all)")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this input of the target alone, in this process")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="where it is made, and stays")
    args = parser.parse_args()
    targets = args.target or list(TARGETS)
    with tempfile.TemporaryDirectory(prefix="hpcmp-fuzz-") as temporary:
        if args.only is not None:
            place = args.keep or Path(temporary)
            target = _prepared(targets[0], place)
            print(one(targets[0], target, args.only, args.seed, place, Watch(place / "outside")))
            return 0
        report = fuzz(targets, args.inputs, args.seed, Path(temporary))
    print(show(report))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
