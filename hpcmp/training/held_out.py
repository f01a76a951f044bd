"""The loss over held-out samples, after the steps that it is asked for."""

from __future__ import annotations

import logging

import numpy as np

from ..data.loader import Batches
from .engine import Engine
from .metrics import Metrics

log = logging.getLogger("hpcmp")


class HeldOut:
    """Evaluates ``engine`` on ``batches`` (None: there are none), as ``run.evaluate_samples`` says; rank 0 tells."""

    def __init__(self, engine: Engine, batches: Batches | None, metrics: Metrics) -> None:
        self.engine, self.batches, self.metrics = engine, batches, metrics
        self._last: tuple[int, float] | None = None  # the step, and the loss after it

    def loss(self, step: int) -> float | None:
        """The mean loss now, after ``step`` steps, in nats a token; None without batches. Taken once for a step.
        Collective."""
        if self.batches is None or self.known(step) is not None:
            return self.known(step)
        config, batch = self.engine.config, self.batches.batch
        losses = [
            self.engine.evaluate(*data, batch=batch)
            for data in self.batches.held_out(max(1, config.run.evaluate_samples // batch))
        ]
        loss = float(np.mean(losses))
        self._last = step, loss
        if self.engine.mesh.rank == 0:
            tokens = step * config.train.batch * config.model.sequence
            self.metrics.write({"step": step - 1, "tokens": tokens, "held_out": loss})
            log.info("step %d/%d  held-out loss %.4f", step, config.train.steps, loss)
        return loss

    def known(self, step: int) -> float | None:
        """What ``loss`` has found after ``step`` steps; None if it was not asked."""
        return self._last[1] if self._last and self._last[0] == step else None
