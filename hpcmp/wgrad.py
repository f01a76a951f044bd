"""When weight gradients are computed: at once, or queued for a later W slot (zero bubble).

A module calls ``wgrad(self.backward_weight, ...)`` exactly once in a backward; a ``Sink`` is told before and after
whose gradients are added, which is how gradient buckets know when they are needed and when they are complete. No
weight gradient reads weights, which may be gone by then (ZeRO stage 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

WGrad = Callable[..., None]


class Sink(Protocol):
    """Where gradients go."""

    def begin(self, module: Any) -> None:
        """The module is about to add to its parameters' ``grad``."""

    def done(self, module: Any, final: bool) -> None:
        """It has; ``final``: for the last time in this step."""


def now(fn: Callable[..., None], *args: Any) -> None:
    """Compute the weight gradient at once."""
    fn(*args)


class Now:
    """Compute at once, telling ``sink``. final: whether this is the last microbatch of the step for these modules."""

    def __init__(self, sink: Sink, final: bool = False) -> None:
        self.sink, self.final = sink, final

    def __call__(self, fn: Callable[..., None], *args: Any) -> None:
        module = getattr(fn, "__self__", None)
        self.sink.begin(module)
        fn(*args)
        self.sink.done(module, self.final)


class Queue:
    """Keep the weight gradients of one microbatch until ``flush``; what they need stays alive until then."""

    def __init__(self) -> None:
        self.items: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    def __call__(self, fn: Callable[..., None], *args: Any) -> None:
        self.items.append((fn, args))

    def flush(self, run: WGrad = now) -> None:
        """Compute all, in the order in which they were queued, freeing each one's arrays as it is done."""
        items, self.items = self.items[::-1], []
        while items:
            fn, args = items.pop()
            run(fn, *args)
