"""How much of the gradients' sums is under way, or done, while the backward still runs: a timeline of one step.

    mpirun -n 2 python benchmarks/overlap.py                              # the text of docs/node.md
    mpirun -n 2 python benchmarks/overlap.py --shared-memory no --plot timeline.png

A sum begins when the last gradient of its bucket is there. It ends in the call that finds it there, ``test`` (after
every layer) or ``wait`` (after the backward), since nothing moves outside calls. What a rank spends in these
calls is its own work (copies, additions) and waiting for others.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

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

    @property
    def busy(self) -> float:
        """Seconds in calls."""
        return self.within(float("inf"))


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


def main(argv: Sequence[str] | None = None) -> None:
    """Print the timeline of the first rank, or draw it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="S")
    parser.add_argument("--shared-memory", choices=("auto", "yes", "no"), default="auto")
    parser.add_argument("--plot", metavar="FILE", help="draw it (needs matplotlib)")
    args = parser.parse_args(argv)

    from hpcmp.comm.detect import start_mpi

    world = start_mpi().COMM_WORLD
    size, here = SIZES[args.size], machine()
    config = config_of(size, world.size, args.shared_memory)
    with mesh_for(config, world) as mesh:
        engine = Engine(config, mesh)
        share = engine.share
        steps = []
        for step in range(7):
            sums: list[Sum] = []
            engine.pipeline.trace = []
            inputs, targets = size.batch_of(step)
            world.Barrier()
            groups = {id(b.copies): b.copies for b in engine.buckets.buckets}
            with contextlib.ExitStack() as stack:
                for group in groups.values():
                    stack.enter_context(recorded(group, sums))
                engine.step(step, inputs[:, share], targets[:, share], _samples(share))
            backward = next(e for e in engine.pipeline.trace if e.action.kind == "B")
            sums = [s for s in sums if s.nbytes > 64]  # not the norm's and the loss's
            steps.append((exposed(sums, backward.end), backward, sums))
        _, backward, sums = sorted(steps[2:], key=lambda s: s[0])[2]  # the median of five, after two to warm up
    if world.rank == 0:
        print(f"{world.size} ranks; {here['cpu']}, {here['cores']} cores; load {here['load'][0]:.1f}; size {args.size}")
        print("\n".join(timeline(sums, backward.start, backward.end)))
        if args.plot:
            draw(sums, backward.start, backward.end, args.plot)


def _samples(share: slice) -> Any:
    import numpy as np

    return np.arange(share.start, share.stop)


def exposed(sums: list[Sum], end: float) -> float:
    """Seconds from the end of the backward until the last sum is there."""
    return max(0.0, max(s.end for s in sums) - end)


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
    total = sum(s.nbytes for s in sums)
    done = sum(s.nbytes for s in sums if s.end <= end)
    busy, early = sum(s.busy for s in sums), sum(s.within(end) for s in sums)
    lines += [
        f"backward {1e3 * (end - start):.1f} ms; the last sum is there {1e3 * exposed(sums, end):.1f} ms after it",
        f"there before its end: {done / total:.0%} of {total / 2**20:.1f} MiB",
        f"in calls: {1e3 * busy:.1f} ms, of which {1e3 * early:.1f} ms within the backward",
    ]
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
