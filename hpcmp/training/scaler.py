"""LossScale: the factor that keeps small gradients of float16 above its smallest number."""

from __future__ import annotations

from typing import Any, NamedTuple

_SMALLEST = 1.0  # a gradient that overflows without any scale is no overflow of float16


class Scale(NamedTuple):
    """S, and how many good steps there were with it."""

    scale: float
    good: int = 0


class LossScale:
    """S: the backward runs on S times the loss, and the optimizer divides by S, before it clips.

    Constant, or dynamic: doubled after ``window`` steps in a row with a finite gradient norm, halved by a step without,
    which is skipped. What S is follows from the norms alone, which are the same on every rank: nothing is exchanged.
    Powers of two scale without rounding. Micikevicius et al., "Mixed precision training", 2018, section 3.2.

    A step counts as good from when it is begun, so that the next can be begun before its norm is known; if it turns out
    that it was not, what was begun after it, with a scale that was too large, is to be begun again.
    """

    def __init__(self, scale: float = 1.0, *, window: int = 2000, dynamic: bool = False) -> None:
        self.now, self.window, self.dynamic = Scale(float(scale)), window, dynamic

    @property
    def scale(self) -> float:
        """S of the step that is begun next."""
        return self.now.scale

    def begun(self) -> Scale:
        """Count a step; returns what was before, which it runs with."""
        before = self.now
        if self.dynamic:
            good = before.good + 1
            self.now = Scale(before.scale, good) if good < self.window else Scale(2 * before.scale)
        return before

    def overflowed(self, before: Scale) -> bool:
        """The step that began with ``before`` had a norm that is not finite: forget it, and those begun after it.

        Returns whether that was an overflow, which the smaller scale may mend that there is now: the step is to be
        skipped. Else it is an error.
        """
        if not self.dynamic:
            return False
        mend = before.scale / 2 >= _SMALLEST
        self.now = Scale(before.scale / 2 if mend else before.scale)
        return mend

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return self.now._asdict()

    def load(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; a constant scale stays what the configuration says."""
        if self.dynamic:
            self.now = Scale(float(state["scale"]), int(state["good"]))
