"""ZeRO: who holds how much, what is summed where, and when weights are there."""

from __future__ import annotations

import math
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp import partition
from hpcmp.comm.mesh import Mesh
from hpcmp.comm.traffic import all_reduced
from hpcmp.module import Parameter, Sequential
from hpcmp.parallel.bucket import Bucket
from hpcmp.parallel.buckets import Buckets
from hpcmp.parallel.zero import Gathered, Window
from hpcmp.traced import Traced
from hpcmp.training.verify import source_of
from hpcmp.wgrad import Now, Queue, now
from tests.layouts import engine, small, spread
from tests.parallel.test_buckets import Holder

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

STAGES = [0, 1, 2, 3]


def model(*sizes: int) -> Sequential:
    return Sequential(*(Holder(Parameter((n,), name=f"{i}")) for i, n in enumerate(sizes)))


def draw(buckets: Buckets, key: int) -> None:
    """Masters that are the same on every layout: by the parameter's name."""
    for bucket in buckets.buckets:
        for piece in bucket.pieces():
            values = np.random.default_rng([key, int(piece.parameter.name)]).standard_normal(piece.parameter.shape)
            bucket.master[piece.place] = values[piece.start : piece.stop]


@pytest.mark.mpi
@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_bytes_held(world: Intracomm, zero: int, dtype: Any) -> None:
    """What docs/zero.md says, to the byte: a shard is ``partition``'s, of each bucket."""
    wide = 8 if dtype == np.float64 else 4
    narrow = np.dtype(dtype).itemsize
    with Mesh(world, dp=world.size, shard=world.size if zero else 1) as mesh:
        buckets = Buckets(model(7, 30, 1, 12), mesh, zero=zero, size=20 * wide, dtype=dtype)
        buckets.initialise(0)
        whole = 50
        share = sum(
            partition.sizes(bucket.size, world.size)[world.rank] if zero else bucket.size for bucket in buckets.buckets
        )
        assert zero == 0 or abs(share - whole / world.size) <= len(buckets.buckets)
        assert buckets.bytes() == {
            "parameters": 0 if zero == 3 else whole * narrow,
            "gradients": wide * (whole if zero < 2 else share),
            "master": 0 if narrow == wide and zero < 3 else wide * share,
        }
        assert sum(world.allgather(share)) == (whole if zero else whole * world.size)


@pytest.mark.mpi
@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_published_weights_are_the_masters_of_all_ranks(world: Intracomm, zero: int, dtype: Any) -> None:
    """Rounded to the dtype of the layers; again after every change."""
    with Mesh(world, dp=world.size, shard=world.size if zero else 1) as mesh:
        module = model(7, 30, 1, 12)
        buckets = Buckets(module, mesh, zero=zero, size=160, dtype=dtype)
        for key in range(2):
            draw(buckets, key)
            buckets.publish()
            for bucket in buckets.buckets:
                bucket.fetch()
                bucket.arrive()
            for p in buckets.parameters:
                wanted = np.random.default_rng([key, int(p.name)]).standard_normal(p.shape)
                assert p.data.dtype == dtype
                np.testing.assert_array_equal(p.data, wanted.astype(buckets.buckets[0].master.dtype).astype(dtype))


@pytest.mark.mpi
@pytest.mark.parametrize("zero", STAGES)
def test_microbatches_of_all_ranks_add_up(world: Intracomm, zero: int) -> None:
    """Three backwards, each adding 1 on every rank: with shards among all ranks, and among pairs with copies."""
    for group in {world.size, 2 if world.size % 2 == 0 else 1}:
        with Mesh(world, dp=world.size, shard=group if zero else 1) as mesh:
            twice = Parameter((5,), name="twice")
            holders = [Holder(twice), Holder(Parameter((7,), name="a"), Parameter((4,), name="b")), Holder(twice)]
            module = Sequential(*holders)
            buckets = Buckets(module, mesh, zero=zero, size=64, dtype=np.float64)
            for _ in range(2):
                buckets.zero()
                for i in range(3):
                    _, saved = module.forward(0.0)
                    module.backward(0.0, saved, Now(buckets, i == 2))
                buckets.finish()
                for bucket in buckets.buckets:
                    uses = 2 if bucket.parameters == [twice] else 1
                    for piece in bucket.pieces():
                        expected = 3 * world.size * (2 if piece.parameter is twice else uses)
                        assert (bucket.grad[piece.place] == expected).all(), piece.parameter
                squares = 9 * world.size**2 * (4 * 5 + 11)
                assert buckets.norm() == pytest.approx(math.sqrt(squares), rel=1e-14)
                if zero > 1:
                    assert all(p.grad is None for p in buckets.parameters)


@pytest.mark.parametrize("zero", [2, 3])
def test_a_table_used_twice_is_scattered_after_each_use(zero: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its gradient, the largest of all, would be whole from the head's backward to the embedding's."""
    table, others = Parameter((5,), name="table"), [Parameter((3,), name=f"{i}") for i in range(2)]
    module = Sequential(Holder(table), *(Holder(p) for p in others), Holder(table))
    buckets = Buckets(module, Mesh(), zero=zero, dtype=np.float64)
    found: list[list[Parameter]] = []
    right = Bucket.scatter

    def scatter(self: Bucket) -> None:
        found.append(self.parameters)
        right(self)

    monkeypatch.setattr(Bucket, "scatter", scatter)
    module.backward(0.0, module.forward(0.0)[1], Now(buckets, True))
    assert [p is table for parameters in found for p in parameters] == [True, False, False, True]


def test_units() -> None:
    """With zero = 3 every child that has parameters is gathered; names and buckets stay within it."""
    module = Sequential(
        embedding=Holder(Parameter((4,))), dropout=Holder(), block=Sequential(a=Holder(Parameter((2,)))), head=Holder()
    )
    before = [p.name or name for name, _, p in module.walk()]
    buckets = Buckets(module, Mesh(), zero=3)
    assert [type(layer) for layer in module.layers.values()] == [Gathered, Holder, Gathered, Holder]
    assert [name for name, _, _ in module.walk()] == before == [p.name for p in buckets.parameters]
    assert [[p.name for p in bucket.parameters] for bucket in buckets.buckets] == [["block/a/0"], ["embedding/0"]]


def test_the_window_holds_the_unit_that_runs_and_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """And asks for nothing twice: not at the turn to the backward, nor from one microbatch to the next."""
    module = model(3, 4, 5, 6)
    buckets = Buckets(module, Mesh(), zero=3, dtype=np.float64)
    buckets.initialise(0)
    fetched: list[int] = []
    held: list[set[int]] = []
    fetch, forward = Bucket.fetch, Holder.forward

    def noted(self: Bucket) -> None:
        if self.data is None and self._gathering is None:
            fetched.append(self.size)
        fetch(self)

    def run(self: Holder, x: Any) -> Any:
        assert self.held[0].data is not None
        held.append({b.size for b in buckets.buckets if b.data is not None or b._gathering is not None})
        return forward(self, x)

    monkeypatch.setattr(Bucket, "fetch", noted)
    monkeypatch.setattr(Holder, "forward", run)
    for final in (False, True):
        _, saved = module.forward(0.0)
        module.backward(0.0, saved, Now(buckets, final))
    assert fetched == [3, 4, 5, 6, 5, 4, 3, 4, 5, 6, 5, 4, 3]
    assert held[:4] == [{3, 4}, {4, 5}, {5, 6}, {6}]
    buckets.publish()
    assert all(p.data is None for p in buckets.parameters)


@pytest.mark.mpi
@pytest.mark.parametrize("zero", STAGES)
def test_traced_layers(world: Intracomm, zero: int) -> None:
    """Users' own layers need neither gradients in the forward nor weights for their weight gradients."""

    def made() -> Sequential:
        p, q = Parameter((3, 4), name="p"), Parameter((4,), name="q")
        return Sequential(Traced(lambda x, w: np.tanh(x @ w), w=p), Traced(lambda x, w: x * w, w=q))

    x = np.random.default_rng(0).standard_normal((5, 3))
    serial = made()
    wanted = {p.name: p for p in serial.initialise(0, np.float64)}
    y, saved = serial.forward(x)
    serial.backward(y, saved, now)
    with Mesh(world, dp=world.size, shard=world.size if zero else 1) as mesh:
        module = made()
        buckets = Buckets(module, mesh, zero=zero, dtype=np.float64)
        buckets.initialise(0)
        y, saved = module.forward(x)
        module.backward(y, saved, queue := Queue())
        buckets.publish()  # with zero = 3, lets go of the weights
        queue.flush(Now(buckets, True))
        buckets.finish()
        for bucket in buckets.buckets:
            for piece in bucket.pieces():
                whole = world.size * wanted[piece.parameter.name].grad.reshape(-1)
                np.testing.assert_allclose(bucket.grad[piece.place], whole[piece.start : piece.stop], rtol=1e-13)


def test_what_is_on_its_way_is_not_lost() -> None:
    a, b = (Buckets(model(n), Mesh(), zero=3, dtype=np.float64).buckets[0] for n in (3, 4))
    window = Window()
    window.move([a], [b])
    window.move([a], [])
    assert a.data is not None and b.data is None
    window.move([b], [a])
    assert b.parameters[0].data.shape == (4,)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("zero", STAGES)
def test_traffic_of_a_step(world: Intracomm, zero: int) -> None:
    """The formulas of docs/zero.md: S is what a rank sends to scatter all gradients, or to gather all weights once."""
    microbatches = 3
    with Mesh(world, dp=world.size, shard=world.size if zero else 1) as mesh:
        module = model(6, 70, 50, 9)
        buckets = Buckets(module, mesh, zero=zero, size=1, dtype=np.float64)  # a bucket for each parameter
        buckets.initialise(0)
        traffic = mesh["shard" if zero else ("dp", "cp", "tp_z")].traffic
        traffic.clear()
        buckets.zero()
        for i in range(microbatches):
            _, saved = module.forward(0.0)
            module.backward(0.0, saved, Now(buckets, i == microbatches - 1))
        buckets.finish()
        buckets.publish()
        last, *between, first = ((b.size - len(b.master), (world.size - 1) * len(b.master)) for b in buckets.buckets)
        scatter, gather = (8 * (first[i] + sum(b[i] for b in between) + last[i]) for i in range(2))
        turns = 8 * (first[1] + last[1])  # units that the next pass finds where the one before left them
        sent = {operation: size for operation, (_, size) in traffic.items()}
        if zero == 0:
            assert sent == {"all_reduce": 8 * sum(all_reduced(b.size, world.size, world.rank) for b in buckets.buckets)}
        else:
            assert sent == {
                "reduce_scatter": scatter * (1 if zero == 1 else microbatches),
                "all_gather": microbatches * (2 * gather - turns) + 8 * first[1] if zero == 3 else gather,
            }


@pytest.mark.mpi(min_size=2)
def test_peak_of_a_step_is_the_shard_and_two_units(world: Intracomm) -> None:
    """Two blocks' weights and three buckets of gradients (one that is filled, two that are summed) besides what a step
    needs without ZeRO, and the shards; nor does any rank hold the whole model while it is made."""
    values = {"layers": 12, "hidden": 48, "heads": 4, "kv_heads": 4, "head_size": 12, "ffn": 192, "vocabulary": 64}
    more: dict[str, Any] = {"sequence": 2, "batch": world.size, "bucket_mb": 0.02, "tied": False}
    built, working = {}, {}
    tracemalloc.start()
    try:
        for zero in (0, 0, 3):  # the first time for what Python keeps
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            with engine(spread(small(**values, **more), f"zero={zero}", world.size), world) as e:
                built[zero] = tracemalloc.get_traced_memory()[1] - before
                inputs = source_of(e.config)(0, e.share)
                e.step(0, *inputs)
                held = tracemalloc.get_traced_memory()[0]
                tracemalloc.reset_peak()
                e.step(1, *inputs)
                working[zero] = tracemalloc.get_traced_memory()[1] - held
                buckets = e.buckets.buckets
    finally:
        tracemalloc.stop()
    whole, largest = (8 * of(bucket.size for bucket in buckets) for of in (sum, max))
    unit = 8 * sum(bucket.size for bucket in buckets if bucket.parameters[0].name.startswith("blocks/0/"))
    shards = 4 * sum(bucket.master.nbytes for bucket in buckets)  # weights, gradient, two moments
    assert whole > 12 * unit
    slack = 64_000  # Python's own objects
    assert working[3] - working[0] < 2 * unit + 3 * largest + slack < whole / 3
    assert built[3] < shards + unit + 4 * slack
