"""The runner on a tiny stage: what it computes, in which order, what it keeps, and when it says that it is done."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.comm.base import Communicator, Solo
from hpcmp.comm.mesh import Mesh
from hpcmp.cursor import Cursor, Place
from hpcmp.module import Module, Parameter, Sequential
from hpcmp.parallel.pipeline import Microbatch, Pipeline
from hpcmp.parallel.schedules import SCHEDULES, Action, Schedule, simulate
from hpcmp.wgrad import WGrad

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi

LENGTH, WIDTH = 3, 4

#: Every schedule, the interleaved one with several numbers of chunks.
ALL: dict[str, Schedule] = {name: make(1) for name, make in SCHEDULES.items()}
ALL |= {f"interleaved-{v}": SCHEDULES["interleaved"](v) for v in (2, 3)}


class Kept:
    """What a layer saves of one microbatch; it can be seen to be alive."""

    def __init__(self, microbatch: int, chunk: int, x: Any, y: Any) -> None:
        self.microbatch, self.chunk, self.x, self.y = microbatch, chunk, x, y


@dataclass
class Seen:
    """What a run did, as the layers saw it."""

    events: list[Action] = field(default_factory=list)
    alive: weakref.WeakSet[Kept] = field(default_factory=weakref.WeakSet)
    peak: int = 0

    @property
    def order(self) -> list[Action]:
        """The actions, each when the first of a stage's two layers was asked for it; both were, once."""
        assert set(Counter(self.events).values()) <= {2}
        return list(dict.fromkeys(self.events))

    def note(self, kind: Any, microbatch: int, chunk: int) -> None:
        self.events.append(Action(kind, microbatch, chunk))
        self.peak = max(self.peak, len({(kept.microbatch, kept.chunk) for kept in self.alive}))


class Layer(Module):
    """y = tanh(x W), which tells what it is asked to do; the place's ``step`` numbers the microbatches here."""

    def __init__(self, number: int, cursor: Cursor, seen: Seen, chunk: int = 0) -> None:
        self.chunk = chunk
        self.weight = Parameter((WIDTH, WIDTH))
        self.weight.data = np.random.default_rng(number).standard_normal((WIDTH, WIDTH))
        self.weight.grad = np.zeros((WIDTH, WIDTH))
        self.cursor, self.seen = cursor, seen

    def forward(self, x: Any) -> tuple[Any, Kept]:
        here = self.cursor.place.step
        kept = Kept(here, self.chunk, x, np.tanh(x @ self.weight.data))
        self.seen.alive.add(kept)
        self.seen.note("F", here, self.chunk)
        return kept.y, kept

    def backward(self, dy: Any, saved: Kept, wgrad: WGrad) -> Any:
        assert (saved.microbatch, saved.chunk) == (self.cursor.place.step, self.chunk)
        self.seen.note("B", saved.microbatch, self.chunk)
        inner = dy * (1 - saved.y**2)
        wgrad(self.backward_weight, saved, inner)
        return inner @ self.weight.data.T

    def backward_weight(self, saved: Kept, inner: Any) -> None:
        assert saved.microbatch == self.cursor.place.step
        self.seen.note("W", saved.microbatch, self.chunk)
        self.weight.grad += saved.x.reshape(-1, WIDTH).T @ inner.reshape(-1, WIDTH)


class Squares(Module):
    """L = sum (y - t)^2 / 2."""

    def __init__(self, cursor: Cursor, seen: Seen, chunk: int) -> None:
        self.cursor, self.seen, self.chunk = cursor, seen, chunk

    def forward(self, x: Any) -> tuple[Any, Kept]:
        kept = Kept(self.cursor.place.step, self.chunk, *x)
        self.seen.alive.add(kept)
        return ((kept.x - kept.y) ** 2).sum() / 2, kept

    def backward(self, dy: Any, saved: Kept, wgrad: WGrad) -> tuple[Any, None]:
        return dy * (saved.x - saved.y), None


def sizes(microbatches: int) -> list[int]:
    """How many samples each has: 1, 0, 2, 1, 0, 2, ..."""
    return [(1 + 2 * i) % 3 for i in range(microbatches)]


def counts(size: int) -> list[int]:
    """Numbers of microbatches to try: fewer than stages, as many, more."""
    return sorted({1, 2, max(1, size - 1), size, size + 1, 2 * size + 1})


def make(
    pp: Communicator, schedule: Schedule, microbatches: int
) -> tuple[Pipeline, list[Microbatch], list[Layer], Seen]:
    """Two layers a virtual stage, the same whole model and samples for every schedule of as many."""
    cursor, seen = Cursor(), Seen()
    chunks = range(schedule.chunks)
    stages = [[Layer(2 * schedule.stage(pp.rank, pp.size, c) + i, cursor, seen, c) for i in range(2)] for c in chunks]

    def shape(place: Place) -> tuple[int, int, int]:
        assert place.samples is not None
        return LENGTH, len(place.samples), WIDTH

    modules = [Sequential(*layers) for layers in stages]
    pipeline = Pipeline(modules, Squares(cursor, seen, chunks[-1]), pp, schedule, cursor, shape, np.empty(0))
    random, batches, start = np.random.default_rng(7), [], 0
    for i, n in enumerate(sizes(microbatches)):
        inputs, targets = random.standard_normal((2, LENGTH, n, WIDTH))
        place = Place(i, np.arange(start, start + n), LENGTH)
        batches.append(Microbatch(inputs if pipeline.first else None, targets if pipeline.last else None, place))
        start += n
    return pipeline, batches, [layer for layers in stages for layer in layers], seen


def serial(stages: int, microbatches: int, scale: float) -> tuple[float, list[Any]]:
    """The loss and every layer's gradient of the whole model, over all samples at once, without a pipeline."""
    cursor, seen = Cursor(), Seen()
    layers = [Layer(i, cursor, seen) for i in range(2 * stages)]
    _, batches, _, _ = make(Solo(), ALL["gpipe"], microbatches)
    inputs, targets = (np.concatenate([getattr(b, side) for b in batches], 1) for side in ("inputs", "targets"))
    model = Sequential(*layers)
    y, saved = model.forward(inputs)
    model.backward(scale * (y - targets), saved, lambda fn, *args: fn(*args))
    return float(((y - targets) ** 2).sum() / 2), [layer.weight.grad for layer in layers]


@pytest.fixture
def pp(world: Intracomm) -> Iterator[Communicator]:
    """All ranks as one pipeline."""
    with Mesh(world, pp=world.size) as mesh:
        yield mesh["pp"]


@pytest.mark.parametrize("name", ALL)
def test_equals_the_serial_model(pp: Communicator, name: str) -> None:
    for m in counts(pp.size):
        pipeline, batches, layers, _ = make(pp, ALL[name], m)
        for layer in layers:
            layer.weight.grad[...] = 1  # gradients are added to what is there
        total = pipeline.step(batches, 0.1)
        loss, gradients = serial(ALL[name].stages(pp.size), m, 0.1)
        assert total == (pytest.approx(loss, rel=1e-13) if pipeline.last else 0.0)
        for i, layer in enumerate(layers):
            expected = gradients[2 * ALL[name].stage(pp.rank, pp.size, layer.chunk) + i % 2]
            np.testing.assert_allclose(layer.weight.grad - 1, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ALL)
def test_actions_are_taken_in_the_order_of_the_schedule(pp: Communicator, name: str) -> None:
    for m in counts(pp.size):
        pipeline, batches, _, seen = make(pp, ALL[name], m)
        pipeline.step(batches, 1.0)
        planned = list(ALL[name](pp.rank, pp.size, m))
        if all(a.kind != "W" for a in planned):  # B is both, and each layer's W follows at once
            assert all(seen.events[at - 1] == e._replace(kind="B") for at, e in enumerate(seen.events) if e.kind == "W")
            planned = [b for a in planned for b in ([a, a._replace(kind="W")] if a.kind == "B" else [a])]
        assert seen.order == planned


@pytest.mark.parametrize("name", ALL)
def test_activations_are_freed_when_the_simulator_says(pp: Communicator, name: str) -> None:
    for m in counts(pp.size):
        pipeline, batches, _, seen = make(pp, ALL[name], m)
        pipeline.step(batches, 1.0)
        assert seen.peak == simulate(ALL[name], pp.size, m).peak[pp.rank]
        assert not seen.alive


class Told:
    """A sink that remembers."""

    def __init__(self, events: list[Action]) -> None:
        self.events = events
        self.begun: list[Any] = []
        self.finals: list[tuple[Any, Any, int]] = []
        self.times: Counter[int] = Counter()

    def begin(self, module: Any) -> None:
        self.begun.append((module, module.weight.grad.copy()))

    def done(self, module: Any, final: bool) -> None:
        before, gradient = self.begun.pop()
        assert before is module
        if self.events[-1].microbatch % 3 != 1:  # which has no samples
            assert (module.weight.grad != gradient).any()
        self.times[id(module)] += 1
        if final:
            self.finals.append((module, module.weight.grad.copy(), len(self.events)))


@pytest.mark.parametrize("name", ALL)
def test_the_sink_is_told_of_every_weight_gradient_and_of_the_last(pp: Communicator, name: str) -> None:
    for m in counts(pp.size):
        pipeline, batches, layers, seen = make(pp, ALL[name], m)
        told = Told(seen.events)
        pipeline.step(batches, 1.0, told)
        assert told.times == {id(layer): m for layer in layers} and not told.begun
        assert Counter(id(module) for module, _, _ in told.finals) == {id(layer): 1 for layer in layers}
        for module, gradient, _ in told.finals:
            np.testing.assert_array_equal(gradient, module.weight.grad)
        # in the chunk's last action with weight gradients, the second layer's while the first's are still to come
        for chunk in range(ALL[name].chunks):
            mine = [(module, at) for module, _, at in told.finals if module.chunk == chunk]
            last = max(at for at, e in enumerate(seen.events) if e.kind == "W" and e.chunk == chunk)
            assert [module for module, _ in mine] == layers[2 * chunk : 2 * chunk + 2][::-1]
            assert seen.events[last] == Action("W", m - 1, chunk)
            assert mine[0][1] < mine[1][1] == last + 1


@pytest.mark.parametrize("name", ALL)
def test_the_trace_is_the_schedule(pp: Communicator, name: str) -> None:
    """What ran on every rank is what the schedule says, in its order, one action after the other in time; and nowhere
    before what it needs from another rank."""
    for m in counts(pp.size):
        pipeline, batches, _, _ = make(pp, ALL[name], m)
        pipeline.trace = []
        began = time.perf_counter()
        pipeline.step(batches, 1.0)
        ended = time.perf_counter()
        assert [executed.action for executed in pipeline.trace] == list(ALL[name](pp.rank, pp.size, m))
        times = [began, *(t for executed in pipeline.trace for t in executed[1:]), ended]
        assert times == sorted(times)


@pytest.mark.parametrize("name", ALL)
def test_no_rank_is_ahead_of_what_it_needs(world: Intracomm, name: str) -> None:
    """On one machine, whose ranks share a clock: an action starts after the one that makes its input has ended."""
    with Mesh(world, pp=world.size) as mesh:
        pp, m = mesh["pp"], world.size + 1
        pipeline, batches, _, _ = make(pp, ALL[name], m)
        pipeline.trace = []
        pipeline.step(batches, 1.0)
        ran = {(r, e.action): e for r, trace in enumerate(mesh.gather_objects(pipeline.trace)) for e in trace}
        assert set(ran) == set(simulate(ALL[name], pp.size, m).starts)
        for (rank, action), executed in ran.items():
            cause = ALL[name].cause(rank, pp.size, action)
            assert cause is None or ran[cause].end <= executed.start


@pytest.mark.parametrize("name", ALL)
def test_evaluate(pp: Communicator, name: str) -> None:
    """The same loss, no gradient, and training goes on as before."""
    pipeline, batches, layers, seen = make(pp, ALL[name], 6)
    total = pipeline.evaluate(batches)
    assert total == (pytest.approx(serial(ALL[name].stages(pp.size), 6, 1.0)[0], rel=1e-13) if pipeline.last else 0.0)
    assert not any(layer.weight.grad.any() for layer in layers)
    assert seen.order == list(ALL[name].forward_only()(pp.rank, pp.size, 6))
    seen.events.clear()
    pipeline.step(batches, 1.0)
    assert [e for e in seen.order if e.kind == "B"] == [a for a in ALL[name](pp.rank, pp.size, 6) if a.kind == "B"]


def test_evaluate_keeps_no_activations(pp: Communicator) -> None:
    """But for those of the microbatch in hand, and at most of the one before."""
    pipeline, batches, _, seen = make(pp, ALL["gpipe"], 6)
    pipeline.evaluate(batches)
    assert seen.peak <= 2


def test_evaluate_keeps_the_schedule_after_an_error(pp: Communicator) -> None:
    pipeline, _, _, _ = make(pp, ALL["gpipe"], 1)
    with pytest.raises(AttributeError):
        pipeline.evaluate([None])  # type: ignore[list-item]
    assert pipeline.schedule is ALL["gpipe"]


def test_no_microbatches(pp: Communicator) -> None:
    pipeline, batches, layers, _ = make(pp, ALL["gpipe"], 0)
    assert pipeline.step(batches, 1.0) == 0
    assert not layers[0].weight.grad.any()


def test_losses_add_up_in_float64(pp: Communicator) -> None:
    """On the last stage the losses of many microbatches do not lose digits to the activations' float32."""
    pipeline, batches, _, _ = make(pp, ALL["gpipe"], 3)
    pipeline.like = np.empty(0, np.float32)
    assert pipeline.evaluate([]).dtype == np.float64
