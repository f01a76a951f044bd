"""LossScale: the factor that keeps small gradients of float16 above its smallest number."""

from __future__ import annotations

from typing import Any

_SMALLEST = 1.0  # a gradient that overflows without any scale is no overflow of float16


class LossScale:
    """S: the backward runs on S times the loss, and the optimizer divides by S, before it clips.

    Constant, or dynamic: doubled after ``window`` steps in a row with a finite gradient norm, halved by a step without,
    which is skipped. What S is follows from the norms alone, which are the same on every rank: nothing is exchanged.
    Powers of two scale without rounding. Micikevicius et al., "Mixed precision training", 2018, section 3.2.
    """

    def __init__(self, scale: float = 1.0, *, window: int = 2000, dynamic: bool = False) -> None:
        self.scale, self.window, self.dynamic = float(scale), window, dynamic
        self.good = 0

    def update(self, finite: bool) -> bool:
        """Take note of whether a step's norm was finite; returns whether it was an overflow, which a smaller scale may
        mend: the step is to be skipped. A norm that is not finite is an error where this returns False."""
        if not self.dynamic:
            return False
        if finite:
            self.good += 1
            if self.good == self.window:
                self.scale, self.good = 2 * self.scale, 0
            return False
        self.good = 0
        if self.scale / 2 < _SMALLEST:
            return False
        self.scale /= 2
        return True

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "good": self.good}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; a constant scale stays what the configuration says."""
        if self.dynamic:
            self.scale, self.good = float(state["scale"]), int(state["good"])
