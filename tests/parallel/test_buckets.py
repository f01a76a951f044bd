"""Buckets: what lies in which, when its sum starts, what the sum is on any layout, and the norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp import random
from hpcmp.comm.mesh import Mesh
from hpcmp.module import Index, Module, Parameter, Sequential
from hpcmp.parallel.buckets import Bucket, Buckets
from hpcmp.training.config import Config
from hpcmp.training.verify import short, source_of
from hpcmp.wgrad import Now, WGrad
from tests.layouts import engine, layouts, small

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


class Holder(Module):
    """Holds parameters, and in backward adds 1 to their gradients in as many calls of wgrad as it is told."""

    def __init__(self, *held: Parameter, calls: int = 1) -> None:
        self.held, self.calls = held, calls

    def forward(self, x: Any) -> tuple[Any, None]:
        return x, None

    def backward(self, dy: Any, saved: None, wgrad: WGrad) -> Any:
        for _ in range(self.calls):
            wgrad(self.backward_weight)
        return dy

    def backward_weight(self) -> None:
        for p in self.held:
            p.grad += 1


def test_parameters_are_views_of_flat_arrays() -> None:
    shapes = [(3, 4), (5,), (2, 1, 3), (0, 7)]
    model = Sequential(Holder(*(Parameter(shape) for shape in shapes)), Holder(Parameter((4,), decay=False)))
    buckets = Buckets(model, Mesh(), dtype=np.float64)
    assert [len(bucket.parameters) for bucket in buckets.buckets] == [1, 4]
    for bucket in buckets.buckets:
        for flat, kind in ((bucket.data, "data"), (bucket.grad, "grad")):
            assert flat.ndim == 1 and flat.dtype == np.float64
            flat[:] = np.arange(flat.size)
            arrays = [getattr(p, kind) for p in bucket.parameters]
            assert [array.shape for array in arrays] == [p.shape for p in bucket.parameters]
            np.testing.assert_array_equal(np.concatenate([a.reshape(-1) for a in arrays]), np.arange(flat.size))
            arrays[-1][...] = -1
            assert flat[-1] == -1
    buckets.zero()
    assert all((bucket.grad == 0).all() for bucket in buckets.buckets)


def test_initial_values_are_written_in_place() -> None:
    model = Sequential(Holder(Parameter((3, 4))))
    buckets = Buckets(model, Mesh(), dtype=np.float32)
    flat = buckets.buckets[0].data
    (p,) = model.initialise(3, np.float32)
    assert np.shares_memory(p.data, flat) and flat.any()
    before = flat.copy()
    flat[:] = 0
    buckets.initialise(3)
    np.testing.assert_array_equal(flat, before)


def test_kinds_do_not_mix() -> None:
    """A bucket owes one sum to one group, in one way, and is decayed or not as a whole."""
    kinds = [
        {"shared": shared, "overlaps": overlaps, "decay": decay}
        for shared in ((), ("tp",), ("ends",))
        for overlaps in (False, True)
        for decay in (False, True)
    ]
    parameters = [Parameter((2,), name=f"{i}/{j}", **kind) for j in range(3) for i, kind in enumerate(kinds)]  # type: ignore[arg-type]
    buckets = Buckets(Holder(*parameters), Mesh())
    assert len(buckets.buckets) == len(kinds)
    for bucket in buckets.buckets:
        assert {(p.shared, p.overlaps, p.decay) for p in bucket.parameters} == {
            (bucket.parameters[0].shared, bucket.overlaps, bucket.decay)
        }
        first = bucket.parameters[0].name[:-2]
        assert [p.name for p in bucket.parameters] == [f"{first}/{j}" for j in (2, 1, 0)]  # in the backward's order


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1e9, [[1, 8, 3, 4, 4, 2]]),
        (8 * 8, [[1], [8], [3, 4], [4, 2]]),
        (8 * 7, [[1], [8], [3, 4], [4, 2]]),
        (8 * 4, [[1], [8], [3], [4], [4], [2]]),
        (1, [[1], [8], [3], [4], [4], [2]]),
    ],
)
def test_size(size: float, expected: list[list[int]]) -> None:
    """At most ``size`` bytes together, in the order of the backward; one parameter may be larger."""
    model = Sequential(*(Holder(Parameter((n,))) for n in (2, 4, 4, 3, 8, 1)))
    buckets = Buckets(model, Mesh(), size=size, dtype=np.float64)
    assert [[math.prod(p.shape) for p in bucket.parameters] for bucket in buckets.buckets] == expected


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Bucket]:
    """The buckets whose sum was started, in that order."""
    found: list[Bucket] = []
    start = Bucket.start

    def recorded(self: Bucket) -> None:
        found.append(self)
        start(self)

    monkeypatch.setattr(Bucket, "start", recorded)
    return found


def test_a_bucket_waits_for_every_use_of_every_parameter(started: list[Bucket]) -> None:
    twice, once = Parameter((2,)), Parameter((3,))
    holders = [Holder(twice), Holder(once), Holder(twice)]
    buckets = Buckets(Sequential(*holders), Mesh())
    (bucket,) = buckets.buckets
    for step in range(2):
        buckets.zero()
        buckets.done(holders[2], True)
        buckets.done(holders[1], True)
        assert len(started) == step
        buckets.done(holders[0], True)
        assert started == [bucket] * (step + 1)
        buckets.finish()
        assert started == [bucket] * (step + 1)


def test_finish_starts_what_nobody_completed(started: list[Bucket]) -> None:
    buckets = Buckets(Sequential(Holder(Parameter((2,))), Holder(Parameter((2,), decay=False))), Mesh())
    buckets.finish()
    assert started == buckets.buckets


def test_done_of_a_module_without_parameters() -> None:
    model = Sequential(Holder(Parameter((2,))))
    buckets = Buckets(model, Mesh())
    buckets.done(model, True)
    buckets.done(None, True)
    assert buckets.buckets[0].missing == 1


def test_a_module_that_calls_wgrad_twice_is_an_error() -> None:
    """Its bucket would be summed before its gradient is whole."""
    model = Sequential(Holder(Parameter((2,), name="a"), calls=2))
    buckets = Buckets(model, Mesh())
    y, saved = model.forward(0.0)
    with pytest.raises(RuntimeError, match=r"Holder called wgrad more than once in a backward \(a\)"):
        model.backward(0.0, saved, Now(buckets, True))


def test_norm_is_added_up_in_float64() -> None:
    p = Parameter((1 << 17,))
    buckets = Buckets(Holder(p), Mesh(), dtype=np.float32)
    p.grad[:] = 1
    p.grad[0] = 1e5  # 1e10 + 1 is 1e10 in float32
    assert buckets.norm() == pytest.approx(math.sqrt(1e10 + (1 << 17) - 1), rel=1e-14)


def every(world: Intracomm, **values: Any) -> list[Config]:
    """Layouts of all ranks, of a model whose middle key-value head is shared and whose embedding is tied."""
    return layouts(small(**values), world.size)


@pytest.mark.mpi
@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_the_sum_starts_with_the_last_gradient_while_the_backward_runs(
    world: Intracomm, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []  # a module, when its weight gradients have been added; a bucket, when its sum starts

    def noted(method: Callable[..., None], before: bool) -> Callable[..., None]:
        def call(self: Any, *args: Any) -> None:
            if before:
                events.append(self)
            method(self, *args)
            if not before:
                events.append(self)

        return call

    monkeypatch.setattr(Bucket, "start", noted(Bucket.start, before=True))
    for config in every(world, style=style, bucket_mb=1e-4, microbatch=3):
        layout = short(config.layout)
        with engine(config, world) as e, monkeypatch.context() as patch:
            uses = [(holder, id(p)) for stage in e.stages for _, holder, p in stage.walk()]
            for kind in {type(holder) for holder, _ in uses}:
                patch.setattr(kind, "backward_weight", noted(kind.backward_weight, before=False))  # type: ignore[attr-defined]
            events.clear()
            e.step(0, *source_of(config)(0, e.share))
            work = [i for i, event in enumerate(events) if isinstance(event, Module)]
            sums = {id(event): i for i, event in enumerate(events) if isinstance(event, Bucket)}
            assert len(work) + len(e.buckets.buckets) == len(events) and len(sums) == len(e.buckets.buckets)
            for bucket in e.buckets.buckets:
                at, parameters = sums[id(bucket)], {id(p) for p in bucket.parameters}
                users = {id(holder) for holder, p in uses if p in parameters}
                last = max(i for i in work if id(events[i]) in users)
                assert last < at, f"{layout}: summed before its last gradient"
                if "ends" in bucket.parameters[0].shared:
                    assert work[-1] < at, f"{layout}: the ends' backwards take different times"
                else:
                    assert not any(last < i < at for i in work), f"{layout}: later than it could be"
            if any(name.startswith("blocks/") for stage in e.stages for name, _, _ in stage.walk()):
                assert min(sums.values()) < work[-1], f"{layout}: nothing runs under the backward"


@pytest.mark.mpi
@pytest.mark.parametrize(
    "values", [{"style": "gpt"}, {"style": "llama", "tied": True}, {"style": "llama", "heads": 2, "kv_heads": 1}]
)
def test_the_sum_is_over_replicas_copies_and_overlapping_shards(world: Intracomm, values: dict[str, Any]) -> None:
    """After ``finish`` each number is the sum of what was there on all ranks that owed it: those that hold it, with the
    same coordinates but for the axes dp and ``shared``."""
    for config in every(world, **values):
        with engine(config, world) as e:
            here = e.mesh.coordinates
            draw = np.random.default_rng(world.rank)
            for bucket in e.buckets.buckets:
                bucket.grad[:] = draw.standard_normal(bucket.grad.size)
            mine = {p.name: (p.index, p.grad.copy()) for p in e.buckets.parameters}
            everyone: list[tuple[dict[str, int], dict[str, tuple[Index, Any]]]] = world.allgather((here, mine))
            e.buckets.finish()
            for p in e.buckets.parameters:
                axes = {"dp", *p.shared} | ({"pp"} if "ends" in p.shared else set())
                whole = np.zeros(p.shape)
                for there, parameters in everyone:
                    if p.name in parameters and all(there[a] == here[a] for a in Mesh.axes if a not in axes):
                        index, grad = parameters[p.name]
                        whole[index] += grad
                np.testing.assert_allclose(
                    p.grad, whole[p.index], rtol=1e-12, atol=1e-13, err_msg=f"{p.name} {short(config.layout)}"
                )


@pytest.mark.mpi
def test_the_ranks_of_a_group_have_the_same_buckets(world: Intracomm) -> None:
    """Whatever the size of their shards: else their sums over the group would be matched with one another's.

    On three ranks and more the key-value heads of a rank are one or two.
    """
    for config in every(world, layers=5, kv_heads=2):
        with engine(config, world) as e:
            here = e.mesh.coordinates
            for size in (100, 300, 600, 1000, 3000):
                buckets = Buckets(e.stages, e.mesh, size=size, dtype=np.float64).buckets
                mine = [(b.parameters[0].shared, [p.name for p in b.parameters]) for b in buckets]
                everyone = world.allgather((here, mine))
                for shared in {shared for shared, _ in mine}:
                    axes = {"dp", *shared} | ({"pp"} if "ends" in shared else set())
                    group = [
                        some for there, some in everyone if all(there[a] == here[a] or a in axes for a in Mesh.axes)
                    ]
                    lists = [[names for kind, names in some if kind == shared] for some in group]
                    assert all(names in ([], lists[0]) for names in lists), f"{short(config.layout)}, {size} bytes"


@pytest.mark.mpi
@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_norm_is_that_of_the_whole_model_on_every_layout(world: Intracomm, style: str) -> None:
    def gradient(p: Parameter, index: Index) -> Any:
        return random.normal_slab(random.key(5, p.name), p.shape, index)

    for config in every(world, style=style):
        with engine(small(style=style)) as serial:
            squares = [np.square(gradient(p, p.index)).sum() for p in serial.buckets.parameters]
        with engine(config, world) as e:
            for p in e.buckets.parameters:
                p.grad[...] = gradient(p, p.index)
            norms = world.allgather(e.buckets.norm())
        assert norms == [norms[0]] * world.size
        assert norms[0] == pytest.approx(math.sqrt(sum(squares)), rel=1e-13), short(config.layout)
