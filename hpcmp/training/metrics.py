"""What a run tells: a line of JSON a step in ``metrics.jsonl``, and a line of the log every few seconds."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from ..arrays import is_half, to_host, wide
from ..kernels.blas import gemm
from ..kernels.cuda import libraries
from .fp8 import verdict
from .layout import short
from .records import Records
from .tensorboard import Events

if TYPE_CHECKING:
    from .engine import Engine

log = logging.getLogger("hpcmp")


class Metrics(Records):
    """The records of ``directory/metrics.jsonl``, and with ``tensorboard`` their numbers for TensorBoard, too."""

    def __init__(self, directory: Path, tensorboard: bool = False) -> None:
        super().__init__(directory / "metrics.jsonl")
        self.events = Events(directory) if tensorboard else None

    def forget_after(self, step: int) -> None:
        """Drop the records of steps from ``step`` on, which a resumed run takes again, and lines that were cut off."""
        self.keep(lambda record: isinstance(record.get("step"), int | float) and record["step"] < step)
        if self.events:
            self.events.begin(step)

    def write(self, record: dict[str, Any]) -> None:
        super().write(record)
        if self.events:
            self.events.write(record)


def greet(engine: Engine) -> None:
    """Say what is trained, on which ranks."""
    c, mesh = engine.config, engine.mesh
    log.info(
        "%s: %s parameters, %d layers; %d ranks as %s; batch %d x %d tokens in %d microbatches",
        *(c.model.style, f"{engine.architecture.parameters:,}", c.model.layers, mesh.size),
        *(short(c.layout), c.train.batch, c.model.sequence, engine.microbatches()),
    )
    if mesh.size > 1:
        log.info("%s", mesh.describe())
    if advice := mesh.advice():
        log.warning("%s", advice)
    if c.train.fp8 != "none":
        found = verdict(c, *(() if c.train.device == "cpu" else (libraries.capability(), libraries.cublaslt().why)))
        log.log(logging.INFO if found.good else logging.WARNING, "train.fp8: %s", found.value)


class Progress:
    """Says how the run goes: at most one line each ``seconds``, on the rank that logs."""

    def __init__(self, steps: int, tokens: int, flops: float, peak: float, seconds: float, start: int) -> None:
        self.steps, self.tokens, self.flops, self.peak, self.seconds = steps, tokens, flops, peak, seconds
        self.began = self.said = self._asked = time.perf_counter()
        self.first = self.last = start

    def rates(self, steps: int, seconds: float) -> tuple[float, float]:
        """(tokens a second, share of the machine's peak) over some steps."""
        per_second = steps * self.tokens / seconds if seconds > 0 else 0.0
        return per_second, per_second * self.flops / self.peak if self.peak else 0.0

    def due(self, step: int) -> bool:
        """Whether it is time for a line after ``step`` steps; asked once for each, before it is taken."""
        now = time.perf_counter()
        due = now - max(self._asked, self.said) >= self.seconds or step == self.steps
        if due:  # the step before may still be under way, and so the line that was asked for
            self._asked = now
        return due

    def tell(self, step: int, loss: float, norm: float) -> None:
        """Say how it goes; ``step`` steps are done."""
        now = time.perf_counter()
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
    calls = 16 if is_half(dtype) else 1  # of some 0.2 ms on a GPU, where asking takes a quarter of that
    a = xp.ones((n, n), dtype)
    out = xp.empty((n, n), dtype)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            (xp.matmul if xp is not np else gemm)(a, a, out=out)
        to_host(out[0, :1])  # waits for the device
        best = max(best, calls * 2 * n**3 / (time.perf_counter() - start))
    return best
