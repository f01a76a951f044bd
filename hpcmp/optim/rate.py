"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, peak: float, warmup: int, total: int, final: float) -> float:
    """The rate of step 0, 1, 2, ...: linear up to ``peak`` over ``warmup`` steps, then a half cosine down.

    rate = peak (step + 1) / warmup                                           while step < warmup
    rate = peak (final + (1 - final) (1 + cos(pi t)) / 2), t in [0, 1]        up to ``total``; peak * final after it

    Loshchilov and Hutter, "SGDR", 2017, without restarts.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    t = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (final + (1 - final) * (1 + math.cos(math.pi * t)) / 2)
