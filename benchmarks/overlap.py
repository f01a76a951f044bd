"""How much of the gradients' sums is hidden under the backward, in shared memory and by MPI; a timeline of one step.

    mpirun -n 2 python benchmarks/overlap.py                              # the text of docs/node.md
    mpirun -n 2 python benchmarks/overlap.py --plot timeline.png

A sum begins when the last gradient of its bucket is there. It ends in the call that finds it there, ``test`` (after
every layer) or ``wait`` (after the backward), since nothing moves outside calls. What a rank spends in these
calls is its own work (copies, additions) and waiting for others. ``alone`` is what the same sums take with nothing
under them, all started and then waited for; what is exposed is the time from the end of the backward until the last sum
is there. Steps with and without shared memory alternate; figures are medians, the timeline is that of the median step.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import SIZES, Size, machine
from hpcmp.comm.base import Communicator, Pending
from hpcmp.training.config import Config, with_layout
from hpcmp.training.engine import Engine, mesh_for


@dataclass
class Sum:
    """One sum: when it began and was there, and the spans (start, end) that this rank spent in calls for it."""

    nbytes: int
    begin: float
    end: float = 0.0
    calls: list[tuple[float, float]] = field(default_factory=list)

    def within(self, until: float) -> float:
        """Seconds in calls before ``until``."""
        return sum(max(0.0, min(b, until) - a) for a, b in self.calls)


@contextlib.contextmanager
def recorded(comm: Communicator, sums: list[Sum]) -> Iterator[None]:
    """Enter every all_reduce of ``comm`` in ``sums``."""
    right = comm.all_reduce

    def all_reduce(x: Any, *args: Any, **kwargs: Any) -> Pending:
        sums.append(found := Sum(x.nbytes, perf_counter()))
        pending = right(x, *args, **kwargs)
        found.calls.append((found.begin, perf_counter()))

        def timed(call: Any) -> Any:
            def run() -> Any:
                start, there = perf_counter(), found.end > 0
                result = call()
                if not there:
                    found.calls.append((start, perf_counter()))
                    if result is not False:
                        found.end = perf_counter()
                return result

            return run

        pending.test, pending.wait = timed(pending.test), timed(pending.wait)  # type: ignore[method-assign]
        return pending

    with patch.object(comm, "all_reduce", all_reduce):
        yield


def config_of(size: Size, ranks: int, shared_memory: str) -> Config:
    """The configuration of a GPT of this size on ``ranks`` replicas."""
    model = {"style": "gpt", "hidden": size.hidden, "layers": size.layers, "heads": size.heads}
    model |= {"sequence": size.sequence, "vocabulary": size.vocabulary}
    tables = {"model": model, "train": {"batch": size.batch}, "communication": {"shared_memory": shared_memory}}
    return with_layout(Config.from_dict(tables), f"dp={ranks}").resolved(ranks=ranks, vocabulary=size.vocabulary)


@dataclass
class Step:
    """One step: when its backward ran, its sums, and the seconds of the same sums alone."""

    start: float
    end: float
    sums: list[Sum]
    alone: float

    @property
    def exposed(self) -> float:
        """Seconds from the end of the backward until the last sum is there."""
        return max(0.0, max(s.end for s in self.sums) - self.end)

    @property
    def early(self) -> float:
        """Seconds in calls for the sums within the backward."""
        return sum(s.within(self.end) for s in self.sums)


def run(engine: Engine, size: Size, i: int, barrier: Callable[[], None]) -> Step:
    """Step i; collective."""
    share = engine.share
    sums: list[Sum] = []
    engine.pipeline.trace = []
    inputs, targets = size.batch_of(i)
    groups = {id(b.copies): b.copies for b in engine.buckets.buckets}
    barrier()
    with contextlib.ExitStack() as stack:
        for group in groups.values():
            stack.enter_context(recorded(group, sums))
        engine.step(i, inputs[:, share], targets[:, share], np.arange(share.start, share.stop))
    backward = next(e for e in engine.pipeline.trace if e.action.kind == "B")
    barrier()
    begin = perf_counter()
    for pending in [b.copies.all_reduce(b.grad, out=b.grad) for b in engine.buckets.buckets]:
        pending.wait()
    alone = perf_counter() - begin
    return Step(
        backward.start, backward.end, [s for s in sums if s.nbytes > 64], alone
    )  # not the norm's and the loss's


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures and the timeline of the first rank, and draw it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="S")
    parser.add_argument("--steps", type=int, default=11, help="of each kind, after two to warm up")
    parser.add_argument("--plot", metavar="FILE", help="draw the timeline (needs matplotlib)")
    args = parser.parse_args(argv)

    from hpcmp.comm.detect import start_mpi

    world = start_mpi().COMM_WORLD
    size, here = SIZES[args.size], machine()
    kinds = {"shared memory": "auto", "MPI": "no"}
    with contextlib.ExitStack() as stack:
        engines, steps = {}, {name: [] for name in kinds}  # type: tuple[dict[str, Engine], dict[str, list[Step]]]
        for name, choice in kinds.items():
            config = config_of(size, world.size, choice)
            engines[name] = Engine(config, stack.enter_context(mesh_for(config, world)))
        for i in range(args.steps + 2):
            for name in reversed(kinds) if i % 2 else kinds:
                steps[name].append(run(engines[name], size, i, world.Barrier))
    if world.rank:
        return
    print(f"{world.size} ranks; {here['cpu']}, {here['cores']} cores; load {here['load'][0]:.1f}; size {args.size}")
    for name, found in steps.items():
        print(f"{name:>13}: {summary(found[2:])}")
    held = sorted(steps["shared memory"][2:], key=lambda s: s.exposed)
    middle = held[len(held) // 2]
    print("\n".join(timeline(middle.sums, middle.start, middle.end)))
    if args.plot:
        draw(middle.sums, middle.start, middle.end, args.plot)


def summary(steps: list[Step]) -> str:
    """Medians over steps, in ms."""

    def median(of: Callable[[Step], float]) -> float:
        return statistics.median(map(of, steps))

    alone, exposed, early = median(lambda s: s.alone), median(lambda s: s.exposed), median(lambda s: s.early)
    return (
        f"sums alone {1e3 * alone:.1f} ms; exposed {1e3 * exposed:.1f} ms, hidden {max(0.0, 1 - exposed / alone):.0%}; "
        f"calls within the backward {1e3 * early:.1f} of {1e3 * median(lambda s: s.end - s.start):.1f} ms"
    )


def timeline(sums: list[Sum], start: float, end: float, width: int = 72) -> list[str]:
    """A line for the backward and one a sum: ``=`` while it is under way, ``#`` where the rank is in a call for it."""
    last = max(end, *(s.end for s in sums))
    scale = width / (last - start)

    def at(t: float) -> int:
        return min(width - 1, max(0, int((t - start) * scale)))

    lines = [f"{'backward':>10} |" + "B" * (at(end) + 1)]
    for s in sums:
        row = [" "] * width
        row[at(s.begin) : at(s.end) + 1] = "=" * (at(s.end) + 1 - at(s.begin))
        for a, b in s.calls:
            if b - a > 0.2 / scale:
                row[at(a) : at(b) + 1] = "#" * (at(b) + 1 - at(a))
        lines.append(f"{s.nbytes / 2**20:6.2f} MiB |" + "".join(row).rstrip())
    total, done = sum(s.nbytes for s in sums), sum(s.nbytes for s in sums if s.end <= end)
    lines.append(f"there before its end: {done / total:.0%} of {total / 2**20:.1f} MiB")
    return lines


def draw(sums: list[Sum], start: float, end: float, path: str) -> None:
    """The same as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.5 + 0.3 * len(sums)), layout="constrained")
    axes.barh(0, 1e3 * (end - start), color="0.6")
    for i, s in enumerate(sums, 1):
        axes.barh(i, 1e3 * (s.end - s.begin), left=1e3 * (s.begin - start), color="tab:blue", alpha=0.4)
        axes.broken_barh([(1e3 * (a - start), 1e3 * (b - a)) for a, b in s.calls], (i - 0.4, 0.8), color="tab:blue")
    axes.set_yticks(range(len(sums) + 1), ["backward", *(f"{s.nbytes / 2**20:.1f} MiB" for s in sums)])
    axes.invert_yaxis()
    axes.set_xlabel("ms since the backward began (dark: the rank is in a call)")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
