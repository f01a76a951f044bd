"""Captured blocks: the bits of blocks that are not, in every style, type, schedule and layout that takes them."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp import captured
from hpcmp.captured import Captured
from hpcmp.kernels.cuda.graphs import Memory
from hpcmp.layers import attention
from hpcmp.training.config import Config
from hpcmp.training.engine import Engine
from hpcmp.training.verify import source_of
from hpcmp.wgrad import Now, Queue
from tests.kernels.emulation.backend import needs_gxx
from tests.kernels.emulation.capture import Device, on_device
from tests.layouts import engine, small

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = [needs_gxx, pytest.mark.timeout(300)]  # g++ builds what has changed

Found = dict[str, Any]
TINY: dict[str, Any] = {"heads": 2, "kv_heads": 1, "head_size": 4, "batch": 4, "microbatch": 2, "dtype": "float32"}


def tiny(**values: Any) -> Config:
    """A configuration of few launches, which the emulation takes its time for."""
    return small(**TINY | values)


def with_graphs(config: Config) -> Config:
    """On a CPU, which the configuration refuses."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, cuda_graphs=True))


@contextlib.contextmanager
def captured_engine(config: Config, world: Intracomm | None = None) -> Iterator[tuple[Engine, Device]]:
    with on_device() as device, engine(with_graphs(config), world) as e:
        yield e, device


def blocks(e: Engine) -> list[Captured]:
    return [layer for stage in e.stages for layer in stage.layers.values() if isinstance(layer, Captured)]


def train(e: Engine, config: Config, steps: int = 2) -> Found:
    """Everything that some steps, and an evaluation after the first, compute."""
    source, found = source_of(config), Found()
    for step in range(steps):
        result = e.step(step, *source(step, e.share))
        found[f"step {step}"] = np.array([result.loss, result.norm])
        found |= {f"gradient {step} {p.name}": np.array(p.grad) for p in e.buckets.parameters}
        if not step:
            found["evaluation"] = np.array(e.evaluate(*source(100, e.share), config.train.batch))
    return found | {f"weight {p.name}": np.array(p.data) for p in e.buckets.parameters}


def differences(config: Config, world: Intracomm | None = None, steps: int = 2) -> list[str]:
    """What differs between a run with graphs and one without; also that it had them, and no more slots than needed."""
    with on_device() as device, engine(config, world) as e:
        wanted = train(e, config, steps)
        assert not device.graphs
    with captured_engine(config, world) as (e, device):
        found = train(e, config, steps)
        assert device.graphs
        assert {block.graphs.backend for block in blocks(e)} == {device}
        slots = [[len(free) for free in block.free.values()] for block in blocks(e)]
        assert all(n <= in_flight(e) for each in slots for n in each), slots
        assert not any(n == 0 for each in slots for n in each), "a slot has not been given back"
    return [name for name, x in wanted.items() if not np.array_equal(x, found[name], equal_nan=False)]


def in_flight(e: Engine) -> int:
    """The most microbatches of one chunk that the schedule has in flight."""
    last = "W" if any(a.kind == "W" for a in e.pipeline.schedule(e.mesh["pp"].rank, e.mesh["pp"].size, 4)) else "B"
    many: dict[int, int] = {}
    most = 0
    for action in e.pipeline.schedule(e.mesh["pp"].rank, e.mesh["pp"].size, e.microbatches()):
        many[action.chunk] = many.get(action.chunk, 0) + (action.kind == "F") - (action.kind == last)
        most = max(most, *many.values())
    return most


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_the_same_bits(style: str, dtype: str) -> None:
    """As without graphs: two blocks, three microbatches, weights that change, an evaluation between steps."""
    assert not differences(small(style=style, dtype=dtype, microbatch=2, heads=3, kv_heads=1))


@pytest.mark.parametrize("recompute", ["full", "attention", "activations"])
@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_recomputation(style: str, recompute: str) -> None:
    """In every second block."""
    dtype = "bfloat16" if style == "gpt" else "float32"
    assert not differences(tiny(style=style, recompute=recompute, recompute_every=2, dtype=dtype))


def test_microbatches_of_two_sizes_have_slots_of_their_own() -> None:
    config = tiny(microbatch=3, batch=5)
    assert not differences(config)
    with captured_engine(config) as (e, _):
        train(e, config)
        assert [sorted(key[0][1] for key in block.free) for block in blocks(e)] == [[2, 3]] * 2


def test_sequences_of_two_lengths() -> None:
    """Whose tables of angles stay for the graphs that read them, and are found by a capture."""
    config = tiny(style="llama", sequence=7)
    found = []
    for graphs in (False, True):
        with on_device() as device, engine(with_graphs(config) if graphs else config) as e:
            inputs, targets, samples = source_of(config)(0, e.share)
            for step in range(6):
                n = (7, 4)[step % 2]
                found.append(np.array(e.step(step, inputs[:n], targets[:n], samples).norm))
                if step == 3:
                    attention._turns.cache_clear()
                    gc.collect()
            assert bool(device.graphs) == graphs
    np.testing.assert_array_equal(found[:6], found[6:])


def test_what_runs_by_graphs() -> None:
    """In a steady state all of the blocks: two graphs a block and microbatch; the rest of a step as without."""
    config = tiny(layers=3, batch=6)
    source, counts = source_of(config), []
    with captured_engine(config) as (e, device):
        for step in range(3):
            device.launches = device.graphs = device.captures = 0
            e.step(step, *source(step, e.share))
            counts.append((device.captures, device.graphs, device.launches))
        assert counts[0][:2] == (3 * 4, 2 * 3 * 2)  # the first microbatch is not captured
        assert counts[1:] == [(0, 3 * 3 * 2, counts[2][2])] * 2
    with on_device() as device, engine(config) as e:
        e.step(0, *source(0, e.share))
        assert device.launches > counts[2][2] + 3 * 3 * 25


def test_what_lies_elsewhere_is_captured_anew() -> None:
    config = tiny()
    source = source_of(config)
    with captured_engine(config) as (e, device):
        losses = [e.step(step, *source(0, e.share)).loss for step in range(2)]
        weights = [np.array(p.data) for p in e.buckets.parameters]
        device.captures = 0
        for bucket in e.buckets.buckets:  # as at a load into new arrays
            for kind, flat in (("data", bucket.data), ("grad", bucket.full)):
                moved = np.empty(flat.shape, flat.dtype)
                moved[...] = flat
                setattr(bucket, {"data": "data", "grad": "full"}[kind], moved)
                bucket._bind(kind, moved)
            bucket.grad = bucket.part(bucket.full)
            bucket.master = bucket.part(bucket.data)
        gradients = [np.array(p.grad) for p in e.buckets.parameters]
        e.gradient(1, *source(0, e.share))
        assert device.captures
        again = [np.array(p.grad) for p in e.buckets.parameters]
        for p, before in zip(e.buckets.parameters, weights, strict=True):
            np.testing.assert_array_equal(p.data, before)
    assert losses[0] != losses[1]
    with on_device(), engine(config) as e:
        for step in range(2):
            e.step(step, *source(0, e.share))
        e.gradient(1, *source(0, e.share))
        for p, found, old in zip(e.buckets.parameters, again, gradients, strict=True):
            np.testing.assert_array_equal(p.grad, found)
            assert not np.array_equal(found, old)


class Told:
    """A sink, and what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def begin(self, module: Any) -> None:
        self.calls.append(("begin", module))

    def done(self, module: Any, final: bool) -> None:
        self.calls.append(("done", module, final))


@pytest.mark.parametrize("queued", [False, True])
def test_a_sink_is_told_of_each_module_once(queued: bool) -> None:
    """As without graphs, but for what a block itself adds, which holds no parameter."""
    config = tiny(layers=1)
    told = []
    with captured_engine(config) as (e, device):
        (block,), x = blocks(e), np.zeros((5, 2, 8), np.float32)
        x[...] = np.random.default_rng(0).normal(size=x.shape)
        for _ in range(3):
            sink, queue = Told(), Queue()
            y, saved = block.forward(x)
            block.backward(y, saved, queue if queued else Now(sink, True))
            del saved
            assert not (queued and sink.calls) and not [f for free in block.free.values() for f in free] * queued
            queue.flush(Now(sink, True))
            told.append([call for call in sink.calls if call[1] is not block])
            assert len(block.free) == 0 or [len(free) for free in block.free.values()] == [1]
        assert device.graphs == 2 * (3 if queued else 2)
        holders = [holder for _, holder, _ in block.walk()]
    assert told[0] == told[1] == told[2]
    assert sorted(id(m) for what, m, *_ in told[0] if what == "done") == sorted({id(m) for m in holders})


def test_nothing_is_kept_when_blocks_go() -> None:
    with captured_engine(tiny()) as (e, device):
        train(e, tiny(), 1)
        used = sum(len(free) for free in device.scratch.free.values())
        assert used == len(device.scratch.all) > 0  # scratch memory is free between graphs
        held = len(device.own.all) - sum(len(free) for free in device.own.free.values())
        e.stages.clear()
        e.pipeline.stages.clear()
        left = len(device.own.all) - sum(len(free) for free in device.own.free.values())
        assert left < held - 2 * 10


def given_back_at_once(init: Any) -> Any:
    def planted(self: Any, slot: Any, free: Any) -> None:
        init(self, slot, [])
        free.append(slot)

    return planted


def first_alone(copy: Any) -> Any:
    done = set()

    def planted(self: Any, target: Any, x: Any) -> None:
        if id(target) not in done:
            copy(self, target, x)
        done.add(id(target))

    return planted


def of_all(_: Any) -> Any:
    def keep(slot: Any, dy: Any) -> None:
        if dy is not None:
            slot.shared[slot.key] = dy

    return property(lambda slot: slot.shared.get(slot.key), keep)


ERRORS = {
    "a slot is given back at once": (captured.Lease, "__init__", given_back_at_once, "gpipe"),
    "x and dy are not copied in": (Device, "copy", first_alone, "1f1b"),
    "all arrays are scratch": (Memory, "alive", lambda _: lambda self: self.kept or frozenset(), "1f1b"),
    "a later weight gradient reads the last dy": (captured.Slot, "dy", of_all, "zb-h1"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_planted_errors_are_found(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, made, schedule = ERRORS[error]
    config = tiny(schedule=schedule, microbatch=1)
    monkeypatch.setattr(where, name, made(getattr(where, name, None)), raising=False)
    try:
        wrong = differences(config)
    except AssertionError as found:
        assert "given back" in str(found) or "slots" in str(found)
    else:
        assert wrong


def test_a_table_that_is_not_held_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Memory, "see", lambda self, args: None)
    with pytest.raises(AssertionError, match="is gone"):
        test_sequences_of_two_lengths()


def test_a_sink_that_is_told_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    once = captured.Slot.backward
    monkeypatch.setattr(captured.Slot, "backward", lambda self, dy: (lambda dx, told: (dx, told * 2))(*once(self, dy)))
    with pytest.raises(RuntimeError, match="more than once"):
        differences(tiny())
