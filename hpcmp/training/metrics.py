"""What a run tells: a line of JSON a step in ``metrics.jsonl``, a line of the log every few seconds, a plot."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..arrays import to_host, wide
from ..kernels.blas import gemm

log = logging.getLogger("hpcmp")


class Metrics:
    """Appends records to ``directory/metrics.jsonl``; a full or read-only disk costs the records, never the run."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "metrics.jsonl"
        self.failed = False

    def write(self, record: dict[str, Any]) -> None:
        """One record, on one line."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            if not self.failed:
                log.warning("%s: %s; training goes on without metrics", self.path, error.strerror or error)
            self.failed = True

    def forget_after(self, step: int) -> None:
        """Drop the records of steps from ``step`` on, which a resumed run takes again."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
            kept = [line for line in lines if _step(line) < step]
            if len(kept) != len(lines):
                self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        except OSError as error:
            log.warning("%s: %s", self.path, error.strerror or error)


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line that was cut off


class Progress:
    """Says how the run goes: at most one line each ``seconds``, on the rank that logs."""

    def __init__(self, steps: int, tokens: int, flops: float, peak: float, seconds: float, start: int) -> None:
        self.steps, self.tokens, self.flops, self.peak, self.seconds = steps, tokens, flops, peak, seconds
        self.began = self.said = time.perf_counter()
        self.first = self.last = start

    def rates(self, steps: int, seconds: float) -> tuple[float, float]:
        """(tokens a second, share of the machine's peak) over some steps."""
        per_second = steps * self.tokens / seconds if seconds > 0 else 0.0
        return per_second, per_second * self.flops / self.peak if self.peak else 0.0

    def after(self, step: int, loss: float, norm: float) -> None:
        """Say so if it is time; ``step`` steps are done."""
        now = time.perf_counter()
        if step == self.last or (now - self.said < self.seconds and step != self.steps):
            return
        per_second, share = self.rates(step - self.last, now - self.said)
        left = (self.steps - step) * (now - self.said) / (step - self.last)
        log.info(
            "step %d/%d  loss %.4f  norm %.3f  %s tokens/s  %.1f%% of peak  ETA %s",
            *(step, self.steps, loss, norm, f"{per_second:,.0f}", 100 * share, clock(left)),
        )
        self.said, self.last = now, step


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 under an hour."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def peak_flops(xp: ModuleType, dtype: DTypeLike) -> float:
    """The rate of this rank's device, in operations a second: the best of a few products of large matrices.

    Measured, not looked up, with all ranks at it together, so that a share of it is what the run could at most reach.
    """
    n, dtype = (768, wide(dtype)) if xp is np else (4096, dtype)  # a CPU computes in no format of 16 bits
    a = xp.ones((n, n), dtype)
    out = xp.empty((n, n), dtype)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        (xp.matmul if xp is not np else gemm)(a, a, out)
        to_host(out[0, :1])  # waits for the device
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def plot(path: Path, output: Path) -> None:
    """Draw the loss of ``metrics.jsonl`` over the tokens seen, as a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("held_out", "held out", "o-")):
        points = [(r["tokens"], r[key]) for r in records if r.get(key) is not None]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, style, label=label, linewidth=1 if key == "loss" else 2, markersize=4)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    if records:
        axes.legend()
    figure.savefig(output, dpi=120)
