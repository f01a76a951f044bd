"""What a run tells while it goes: its start, a record of the metrics a step, a line of the log now and then."""

from __future__ import annotations

import logging
import math

from .engine import Engine, Result
from .metrics import Metrics, Progress, peak_flops
from .phases import Watch

log = logging.getLogger("hpcmp")


class Telling:
    """Metrics and log of a run that begins after ``step`` steps; rank 0 alone writes. Making it, and ``after``, are
    collective.

    progress: the rates. tokens: of a step.
    """

    def __init__(self, engine: Engine, metrics: Metrics, step: int) -> None:
        self.engine, self.config, self.metrics = engine, engine.config, metrics
        self.logs = engine.mesh.rank == 0
        if self.logs:
            metrics.forget_after(step)
        peak = sum(engine.mesh.gather_objects(peak_flops(engine.xp, engine.dtype)))
        model, train = self.config.model, self.config.train
        flops = engine.architecture.flops_per_token(model.sequence)
        self.tokens = train.batch * model.sequence
        self.progress = Progress(train.steps, self.tokens, flops, peak, self.config.run.log_seconds, step)
        self.watch = Watch(engine.mesh, engine.phases)

    def due(self, step: int) -> bool:
        """Whether this rank wants a line of the log after ``step`` steps."""
        return self.logs and self.progress.due(step)

    def after(self, step: int, result: Result, seconds: float) -> None:
        """``step`` steps are done, of which the last took ``seconds``."""
        if self.logs:
            self._record(step, result, seconds)
        if result.tell:
            record = self.watch.look(step)
            if record is not None:
                self.metrics.write(record | {"tokens": step * self.tokens})
                self.progress.tell(step, result.loss, result.norm)

    def _record(self, step: int, result: Result, seconds: float) -> None:
        per_second, share = self.progress.rates(1, seconds)
        unsound = result.skipped or bool(result.trouble)
        routers = ("balance", "z", "dropped") if self.config.model.experts and not unsound else ()
        self.metrics.write(
            {
                "step": step - 1,
                "tokens": step * self.tokens,
                "loss": result.loss if math.isfinite(result.loss) else None,  # a skipped step's may be neither
                "norm": None if unsound else result.norm,
                "rate": result.rate,
                **{name: getattr(result, name) for name in routers},
                "seconds": seconds,
                "tokens_per_second": per_second,
                "share_of_peak": share,
                **({"skipped": result.trouble or "float16"} if unsound else {}),
            }
        )
        if result.trouble:
            log.warning("step %d: %s; skipped", step - 1, result.trouble)
        elif result.skipped:
            scale = self.engine.loss_scale.scale
            log.info("step %d: the gradient overflows float16; skipped, the loss scale is %g now", step - 1, scale)
