"""Ranges: in which step, phase, action of the schedule and layer this rank is, kept for a profile or told to NVTX.

Nothing of it costs anything while it is not installed: layers are then called as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType, ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..captured import Captured
from ..module import Module, Parameter

if TYPE_CHECKING:
    from ..arrays import Array
    from ..parallel.pipeline import Run
    from ..parallel.schedules import Action
    from ..wgrad import WGrad
    from .engine import Engine

#: In the order in which they lie in one another. A bubble is a wait for another stage of the pipeline.
#: ``profile_summary`` tells it from other waits for communication.
Kind = Literal["step", "phase", "action", "layer", "wait", "bubble"]
#: What of a layer is called, and what that is in a trace; weight gradients lie in a backward, or in a W action.
CALLS = {"forward": "forward", "backward": "backward", "backward_weight": "weight gradient"}


class Range:
    """A time that this rank spent in something: ``start`` to ``end`` in seconds of one clock; while it is open ``end``
    is None. about: what else there is to say. device: the events of a GPU at its start and end."""

    __slots__ = ("about", "device", "end", "kind", "name", "start")

    def __init__(self, kind: Kind, name: str, start: float = 0.0, end: float | None = None, **about: Any) -> None:
        self.kind, self.name, self.about = kind, name, about
        self.start, self.end = start, end
        self.device: list[Any] = []

    @property
    def title(self) -> str:
        """The name, and of a layer what of it is called."""
        return f"{self.name} {self.about['direction']}" if "direction" in self.about else self.name

    @property
    def until(self) -> float:
        """Its end, or where it is open its start."""
        return self.start if self.end is None else self.end

    @property
    def seconds(self) -> float:
        """How long it is; nothing while it is open."""
        return self.until - self.start

    def __repr__(self) -> str:
        return f"Range({self.kind!r}, {self.name!r}, {self.start}, {self.end})"


class Ranges:
    """``with ranges("layer", "head", direction="forward"): ...``, for arrays of ``xp``.

    keep: whether ranges are kept, in ``kept``, by ``clock`` and on a GPU by events on the current stream, too; nothing
    waits for a GPU. On a GPU NVTX is told of each range, where CuPy has it.
    """

    def __init__(self, xp: ModuleType = np, *, keep: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self.kept: list[Range] = []
        self.keep, self.clock = keep, clock
        self.nvtx: Any = None if xp is np or not hasattr(xp.cuda.nvtx, "RangePush") else xp.cuda.nvtx
        self.event: Any = None if xp is np or not keep else partial(timed, xp)

    @contextmanager
    def __call__(self, kind: Kind, name: str, **about: Any) -> Iterator[None]:
        made = Range(kind, name, **about)
        if self.keep:
            self.kept.append(made)
        if self.nvtx is not None:
            self.nvtx.RangePush(made.title)
        if self.event is not None:
            made.device.append(self.event())
        made.start = self.clock()
        try:
            yield
        finally:
            made.end = self.clock()
            if self.event is not None:
                made.device.append(self.event())
            if self.nvtx is not None:
                self.nvtx.RangePop()


def timed(xp: ModuleType) -> Any:
    """An event that the current stream of the GPU of ``xp`` comes to next, and that knows when it did."""
    event = xp.cuda.Event()
    event.record(xp.cuda.get_current_stream())
    return event


@contextmanager
def installed(engine: Engine, ranges: Ranges) -> Iterator[None]:
    """In the body, ``ranges`` are made of phases, actions and layers of ``engine``, and of its loss."""
    pipeline, phases = engine.pipeline, engine.phases
    with ExitStack() as undo:
        phases.ranges = ranges
        undo.callback(setattr, phases, "ranges", None)
        stages = [pipeline.schedule.stage(pipeline.pp.rank, pipeline.pp.size, c) for c in range(len(pipeline.stages))]
        pipeline.around = partial(_actions, ranges, stages)
        undo.callback(setattr, pipeline, "around", None)
        for stage in (*pipeline.stages, Named(loss=pipeline.loss)):
            for name, module in layers(stage):
                undo.enter_context(_wrapped(module, name, ranges))
        yield


class Named(Module):
    """Modules under names, to walk over."""

    def __init__(self, **modules: Module) -> None:
        self.modules = modules


def layers(module: Module, path: str = "") -> Iterator[tuple[str, Module]]:
    """(path, module) of all that lies in ``module``, from the outside in; of several modules under one path, such as a
    block and what gathers its weights, the outermost; nothing in what is captured, of which only the whole runs."""
    for name, item in module.members():
        if isinstance(item, Parameter):
            continue
        where = "/".join(part for part in (path, name) if part)
        if where != path:
            yield where, item
        if not isinstance(item, Captured):
            yield from layers(item, where)


@contextmanager
def _wrapped(module: Module, name: str, ranges: Ranges) -> Iterator[None]:
    """In the body, the calls of ``module`` itself make ranges; they stay methods of it, as a ``Sink`` wants them."""
    mine = [call for call in CALLS if hasattr(module, call) and call not in vars(module)]
    for call in mine:
        setattr(module, call, MethodType(_ranged(ranges, name, CALLS[call], getattr(module, call)), module))
    try:
        yield
    finally:
        for call in mine:
            delattr(module, call)


def _ranged(ranges: Ranges, name: str, direction: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def ranged(self: Module, *args: Any) -> Any:
        with ranges("layer", name, direction=direction):
            return call(*args)

    return ranged


def _actions(ranges: Ranges, stages: list[int], run: Run) -> Run:
    """``run``, in ranges; ``stages``: the virtual stage of each chunk."""

    def ranged(action: Action, entering: Array | None, wgrad: WGrad) -> Array | None:
        with ranges("action", str(action), stage=stages[action.chunk], microbatch=action.microbatch):
            return run(action, entering, wgrad)

    return ranged
