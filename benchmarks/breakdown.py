"""Where a step's time goes: timers round hpcmp's kernels, communicators and optimizer, for a few steps of their own.

A timer's time is its own: what it encloses counts for itself alone. Communication is what the step waits for: starting
messages, and waiting for what was not hidden, the other ranks included; ``if not hidden`` is what the same collectives
take one after the other, with nothing to do under them. The timers cost about a microsecond a call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

import numpy as np

from hpcmp import kernels
from hpcmp.comm.mesh import Mesh
from hpcmp.kernels import composed

STEPS = 5

#: What a kernel counts as, by a part of its name; the first that fits. Anything else is element-wise.
KINDS = {
    "gemm": ("matmul", "add_outer", "linear"),
    "attention": ("attention",),
    "loss": ("cross_entropy", "head"),
    "optimizer": ("adamw", "square_sum", "sgd", "nesterov"),
}
ROWS = ("gemm", "attention", "element-wise", "loss", "optimizer", "communication", "rest")
_COLLECTIVES = ("all_reduce", "all_gather_v", "reduce_scatter_v", "all_to_all_v", "broadcast")
_CALLS = (*_COLLECTIVES, "all_gather", "reduce_scatter", "all_to_all", "send", "recv")


class Timers:
    """Seconds and calls by kind, each without what is timed inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._inside = [0.0]  # of every open timer: the seconds that others have had within it

    def wrap(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, timed."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                self.seconds[kind] = self.seconds.get(kind, 0.0) + took - self._inside.pop()
                self.calls[kind] = self.calls.get(kind, 0) + 1
                self._inside[-1] += took

        return timed


def kind_of(kernel: str) -> str:
    """What a kernel counts as."""
    return next((kind for kind, parts in KINDS.items() if any(p in kernel for p in parts)), "element-wise")


@contextmanager
def timing(engine: Any, timers: Timers, started: list[Callable[[], Any]]) -> Iterator[None]:
    """Timers round what ``engine`` calls; each collective is also put in ``started``, to be done again."""
    sets = [kernels.of(np.empty(0, np.float32))]
    groups = [group for group in engine.mesh._groups.values() if group.size > 1]
    before = [dict(vars(held)) for held in (*sets, *groups)]
    for held in sets:
        for name, function in list(vars(held).items()):
            if callable(function) and not hasattr(composed, name):  # whose parts are timed
                setattr(held, name, timers.wrap(kind_of(name), function))
    for group in groups:
        for name in _CALLS:
            setattr(group, name, _communicating(timers, getattr(group, name), started if name in _COLLECTIVES else []))
    optimizer = engine.optimizer
    optimizer.apply = timers.wrap("optimizer", optimizer.apply)
    try:
        yield
    finally:
        for held, attributes in zip((*sets, *groups), before, strict=True):
            vars(held).clear()
            vars(held).update(attributes)
        del optimizer.apply


def _communicating(timers: Timers, call: Callable[..., Any], started: list[Callable[[], Any]]) -> Callable[..., Any]:
    """A communicator's ``call``, its start and its wait timed."""

    def start(*args: Any, **kwargs: Any) -> Any:
        pending = call(*args, **kwargs)
        if "wait" not in vars(pending):
            pending.wait = timers.wrap("communication", pending.wait)
            pending.test = timers.wrap("communication", pending.test)
            shape, dtype = np.shape(args[0]), getattr(args[0], "dtype", None)
            rest = {key: value for key, value in kwargs.items() if key != "out"}
            if dtype is not None:
                started.append(lambda: call(np.zeros(shape, dtype), *args[1:], **rest).wait())
        return pending

    return timers.wrap("communication", start)


def breakdown(steps: Any, small: Callable[[Any], Any]) -> dict[str, Any]:
    """Milliseconds of the fastest of a few steps by kind, and calls. ``steps``: a ``hpcmp_step.Steps``; ``small`` makes
    one of another size.

    ``fixed`` is a step of the same depth, microbatches and layout at tiny sizes: what the engine's Python, and messages
    of no length, cost.
    """
    engine: Any = steps.engine
    fastest: Timers | None = None
    least, started = float("inf"), []
    for i in range(1 + STEPS):  # in the first of which the timers' own code warms
        timers, calls = Timers(), []
        with timing(engine, timers, calls):
            start = time.perf_counter()
            steps(10**5 + i)
            took = time.perf_counter() - start
        if i and took < least:
            least, fastest, started = took, timers, calls
    assert fastest is not None
    found: dict[str, Any] = {kind: 1e3 * fastest.seconds.get(kind, 0.0) for kind in ROWS}
    found["rest"] = 1e3 * least - sum(found.values())
    engine.mesh[Mesh.axes].all_reduce(np.zeros(1)).wait()
    start = time.perf_counter()
    for collective in started:
        collective()
    found["if not hidden"] = 1e3 * (time.perf_counter() - start)
    found["calls"] = fastest.calls
    found["step"] = 1e3 * least
    tiny = small(replace(steps.size, hidden=8 * steps.size.heads, sequence=8, vocabulary=64))
    times = []
    for i in range(8):
        start = time.perf_counter()
        tiny(i)
        times.append(time.perf_counter() - start)
    found["fixed"] = 1e3 * min(times)
    return found
