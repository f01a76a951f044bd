"""When weight gradients are computed: at once, or queued for a later W slot (zero bubble).

A module calls ``wgrad(self.backward_weight, ...)`` exactly once in a backward; ``done`` is then told which module's
gradients have been added, which is how gradient buckets know when they are complete.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

WGrad = Callable[..., None]
Done = Callable[[Any], None]


def now(fn: Callable[..., None], *args: Any) -> None:
    """Compute the weight gradient at once."""
    fn(*args)


class Now:
    """Compute at once, then tell ``done``."""

    def __init__(self, done: Done) -> None:
        self.done = done

    def __call__(self, fn: Callable[..., None], *args: Any) -> None:
        fn(*args)
        self.done(getattr(fn, "__self__", None))


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
