"""Offload: what is copied, in which order, when it is waited for, and that nothing is used before or after its time."""

from __future__ import annotations

import gc
import sys
import weakref
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

from hpcmp import wgrad
from hpcmp.arrays import Array
from hpcmp.comm.base import Pending
from hpcmp.module import Module, Sequential
from hpcmp.offload import Copies, CudaCopies, Host, Offload
from hpcmp.testing import gradcheck
from hpcmp.training.verify import source_of
from hpcmp.wgrad import WGrad
from tests.layouts import assert_serial, engine, small, spread

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


class Slow(Copies):
    """Really copies, as late as it may: when it is waited for; what was copied away is then of no use any more.

    ``log`` has what happens, in order: (what, number of the array).
    """

    def __init__(self, smallest: int = 0) -> None:
        self.smallest, self.log = smallest, list[tuple[str, int]]()
        self.numbers: dict[int, int] = {}

    def away(self, x: Array, out: Array | None = None) -> Pending:
        host = np.full_like(x, -77) if out is None else out
        number = self.numbers.setdefault(id(host), len(self.numbers))
        self.log.append(("away", number))

        def copy() -> None:
            host[...] = x
            if x.flags.writeable:
                x[...] = -99

        return Pending(host, [Request(self, "gone", number, copy)], None, host)

    def back(self, x: Array) -> Pending:
        device, number = np.full_like(x, -77), self.numbers[id(x)]
        self.log.append(("back", number))
        return Pending(device, [Request(self, "here", number, lambda: np.copyto(device, x))])


class Request:
    def __init__(self, copies: Slow, what: str, number: int, copy: Any) -> None:
        self.copies, self.what, self.number, self.copy = copies, what, number, copy

    def Wait(self) -> None:
        self.copies.log.append((self.what, self.number))
        self.copy()

    def Test(self) -> bool:
        return False


class Saves(Module):
    """y = x, keeping an array of its own, and telling the log of its backward."""

    def __init__(self, number: int, copies: Slow) -> None:
        self.number, self.copies = number, copies

    def forward(self, x: Array) -> tuple[Array, Any]:
        return x.copy(), {"kept": [np.full(3, float(self.number))]}

    def backward(self, dy: Array, saved: Any, wgrad: WGrad) -> Array:
        self.copies.log.append(("backward", self.number))
        np.testing.assert_array_equal(saved["kept"][0], self.number)
        return dy


def test_each_block_brings_back_what_the_next_one_needs() -> None:
    copies = Slow()
    host = Host(copies=copies)
    model = Sequential(*(Offload(Saves(i, copies), host) for i in range(3)))
    y, saved = model.forward(np.ones(2))
    assert copies.log == [("away", 0), ("gone", 0), ("away", 1), ("gone", 1), ("away", 2)]  # two at once at most
    copies.log.clear()
    model.backward(y, saved, wgrad.now)
    assert copies.log == [
        *[("gone", 2), ("back", 2), ("here", 2), ("back", 1), ("backward", 2)],
        *[("here", 1), ("back", 0), ("backward", 1)],
        *[("here", 0), ("backward", 0)],
    ]


def test_microbatches_under_way_keep_their_own() -> None:
    """In any order of the backwards."""
    model = Sequential(*(Offload(Scale(), Host(copies=Slow())) for _ in range(3)))
    xs = [np.full(4, float(m + 2)) for m in range(3)]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        ys = [model.forward(x.copy()) for x in xs]
        for m in order:
            dx = model.backward(np.ones(4), ys[m][1], wgrad.now)
            np.testing.assert_allclose(dx, 8 * xs[m] ** 7)  # x^8


class Scale(Module):
    """y = x^2."""

    def forward(self, x: Array) -> tuple[Array, Array]:
        return x * x, x

    def backward(self, dy: Array, saved: Array, wgrad: WGrad) -> Array:
        return 2 * saved * dy


class Named(NamedTuple):
    a: Any
    b: Any


def test_what_is_copied() -> None:
    """Arrays in lists, tuples, named tuples and dicts, each once, of at least so many bytes; all else stays."""
    copies, large, small_one, other = Slow(smallest=64), np.arange(8.0), np.arange(3.0), object()
    tree = [large, (small_one, {"x": large}), Named(None, large), other, 3.5, np.float64(2)]
    saved = Host(copies=copies).save(tree)
    assert len(saved.handles) == 1
    found = saved.take()
    assert found[0] is found[1][1]["x"] is found[2].b is not large
    np.testing.assert_array_equal(found[0], np.arange(8.0))
    assert isinstance(found[2], Named) and found[1][0] is small_one and found[3] is other and found[4:] == tree[4:]


def test_nothing_is_kept_that_no_backward_needs() -> None:
    """An evaluation drops what it saved; so does a backward."""
    host = Host()
    model = Sequential(*(Offload(Scale(), host) for _ in range(3)))
    x = np.ones(1000)
    y, saved = model.forward(x)
    inner = weakref.ref(saved[1])
    model.backward(y, saved, wgrad.now)
    del saved
    gc.collect()
    assert inner() is None and host.last() is None
    gone = weakref.ref(model.forward(x)[1][0])
    gc.collect()
    assert gone() is None


def test_handle() -> None:
    """What an optimizer does with its moments."""
    copies = Slow()
    handle = Host(copies=copies).put(np.zeros(3))
    assert handle.fetch() is handle.fetch()
    m = handle.fetch().wait()
    np.testing.assert_array_equal(m, 0)
    m += 5
    handle.store(m)
    np.testing.assert_array_equal(handle.fetch().wait(), 5)
    np.testing.assert_array_equal(handle.host(), 5)
    handle.host()[...] = 7  # a checkpoint is read
    np.testing.assert_array_equal(handle.fetch().wait(), 7)
    assert handle.host() is handle.host()


def test_on_the_cpu_nothing_is_copied() -> None:
    x = np.zeros(3)
    handle = Host().put(x)
    assert handle.fetch().wait() is x
    handle.store(x)
    assert handle.host() is x


class Far(np.ndarray):
    """An array as CuPy's are, whose copies begin and do not end."""

    def get(self, stream: Any, out: Array, blocking: bool) -> None:
        assert not blocking

    def set(self, x: Array, stream: Any) -> None:
        """Nothing yet."""


@pytest.mark.parametrize("way", ["away", "back", "read"])
def test_pinned_memory_is_held_until_its_copy_is_over(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else holds it, and CuPy's pool would hand it out to the next who asks."""
    events: list[Any] = []

    def event(disable_timing: bool) -> Any:
        events.append(SimpleNamespace(done=False, record=lambda stream: None))
        return events[-1]

    stream = SimpleNamespace(wait_event=lambda event: None)
    cuda = SimpleNamespace(Stream=lambda non_blocking: stream, Event=event, get_current_stream=lambda: stream)
    xp: Any = SimpleNamespace(cuda=cuda, empty=lambda *given: np.empty(*given).view(Far), ascontiguousarray=lambda x: x)
    pinned: list[Any] = []

    def empty_pinned(*given: Any) -> Array:
        made = np.empty(*given)
        pinned.append(weakref.ref(made))
        return made

    monkeypatch.setitem(sys.modules, "cupyx", SimpleNamespace(empty_pinned=empty_pinned))
    copies = CudaCopies(xp)
    if way == "read":
        copies.read(xp.empty(3))
    elif way == "back":
        copies.back(empty_pinned(3)).wait()  # for what is queued from now on: the host does not wait
    else:
        copies.away(xp.empty(3)).wait()
    gc.collect()
    assert pinned[0]() is not None
    for each in events:
        each.done = True
    copies.away(xp.empty(3))
    gc.collect()
    assert pinned[0]() is None


def test_gradients() -> None:
    gradcheck(Offload(Scale(), Host()), np.ones((2, 3)))


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "muon"])
def test_offloaded_moments_come_back_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of every optimizer, stepped three times and then read as a checkpoint reads it."""
    found = []
    for offload in ("none", "optimizer"):
        monkeypatch.setattr("hpcmp.training.engine.Host", lambda xp: Host(xp, Slow()))
        config = small(name=name, offload=offload, bucket_mb=1e-3)
        with engine(config) as e:
            source = source_of(config)
            for step in range(3):
                e.step(step, *source(step, e.share))
            log = e.host.copies.log  # type: ignore[attr-defined]
            held = {(kind, piece.parameter.name): state.copy() for kind, piece, state in e.optimizer.state()}
            found.append((held, [bucket.master.copy() for bucket in e.buckets.buckets]))
    (wanted, weights), (held, again) = found
    assert wanted.keys() == held.keys()
    for key, state in wanted.items():
        np.testing.assert_array_equal(held[key], state, str(key))
    for a, b in zip(weights, again, strict=True):
        np.testing.assert_array_equal(a, b)
    first = next(i for i, (what, _) in enumerate(log) if what == "here")
    assert [what for what, _ in log[:first]].count("back") > len(e.optimizer.states[0])  # the next bucket's is coming


def assert_offloaded_activations_come_back_right(world: Intracomm | None = None) -> None:
    """The gradients of a model whose activations were copied away, as late as can be, and overwritten."""
    ranks = 1 if world is None else world.size
    layout = f"pp={ranks},micro=2,offload=activations" + (",recompute=activations,recompute_every=2")
    for style in ("gpt", "llama"):
        config = small(layers=max(4, ranks), dropout=0.1, style=style)
        found = []
        for text in (f"pp={ranks},micro=2", layout):
            with engine(spread(config, text), world) as e:
                e.host.copies = Slow()
                source = source_of(config)
                results = [e.step(step, *source(step, e.share)) for step in range(2)]
                found.append(([r.loss for r in results], {p.name: p.grad.copy() for p in e.buckets.parameters}))
                assert bool(e.host.copies.log) == (text is layout)
        (losses, gradients), (again, offloaded) = found
        assert losses == again
        for name, gradient in gradients.items():
            np.testing.assert_array_equal(offloaded[name], gradient, name)


@pytest.mark.mpi
def test_offloaded_activations_come_back_right(world: Intracomm) -> None:
    assert_offloaded_activations_come_back_right(world)


LAYOUTS = {
    1: ["offload=activations,micro=2", "offload=optimizer", "offload=both,recompute=full,recompute_every=2"],
    2: ["tp=2,sp=1,offload=activations", "pp=2,micro=1,schedule=zb-h1,offload=activations", "dp=2,zero=3,offload=both"],
    4: ["pp=2,tp=2,micro=2,offload=activations,recompute=attention", "cp=2,dp=2,offload=activations"],
}


@pytest.mark.mpi
@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_a_model_is_the_serial_one(world: Intracomm, style: str) -> None:
    if world.size not in LAYOUTS:
        pytest.skip("other numbers of ranks show it")
    config = small(layers=3, style=style, dropout=0.1, experts=3, experts_every=2)
    assert_serial([spread(config, text) for text in LAYOUTS[world.size]], world)
