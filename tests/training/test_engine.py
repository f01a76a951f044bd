"""The engine: what a step returns on every rank, uneven batches, evaluation, dropout, and loss curves in float32."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.training.config import Config
from hpcmp.training.engine import Result, architecture
from hpcmp.training.verify import Source, short, source_of
from tests.layouts import engine, layouts, small, spread

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

AT_ALL = 1e-300  # a learning rate that changes no weight


def steps(config: Config, comm: Intracomm | None, count: int, source: Source | None = None) -> list[Result]:
    """The results of the first ``count`` steps."""
    source = source or source_of(config)
    with engine(config, comm) as e:
        return [e.step(i, *source(i, e.share)) for i in range(count)]


def affine(config: Config) -> Source:
    """Data that can be learnt: the next token is (5 token + 3) mod vocabulary, or any with probability 1/10."""
    size, length, batch = config.model.vocabulary, config.model.sequence, config.train.batch

    def source(step: int, share: slice) -> Any:
        draw = np.random.default_rng((1, step))
        x = np.empty((length + 1, batch), np.int64)
        x[0] = draw.integers(0, size, batch)
        for t in range(length):
            x[t + 1] = np.where(draw.random(batch) < 0.1, draw.integers(0, size, batch), (5 * x[t] + 3) % size)
        return x[:-1, share], x[1:, share], np.arange(share.start, share.stop)

    return source


@pytest.mark.mpi
@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_a_result_is_the_same_on_every_rank_and_on_every_layout(world: Intracomm, style: str) -> None:
    wanted = steps(small(style=style), None, 2)
    for config in layouts(small(style=style), world.size):
        found = steps(config, world, 2)
        assert world.allgather(found) == [found] * world.size
        for here, there in zip(found, wanted, strict=True):
            numbers, wanted_numbers = ([*dataclasses.astuple(result)] for result in (here, there))
            assert (numbers.pop(), wanted_numbers.pop()) == ("", ""), "trouble"
            assert numbers == pytest.approx(wanted_numbers, rel=1e-12), short(config.layout)


def assert_the_gradient_is_that_of_the_mean_loss() -> None:
    """Central differences of the step's loss, in random directions, for all parameters together."""
    for style in ("gpt", "llama"):
        config = small(style=style, learning_rate=AT_ALL, dropout=0.1)
        batch = source_of(config)(0, slice(0, 6))
        with engine(config) as e:
            e.step(0, *batch)
            draw = np.random.default_rng(0)
            for _ in range(3):
                e.step(0, *batch)
                kept = [(p, p.data.copy(), p.grad.copy(), draw.standard_normal(p.shape)) for p in e.buckets.parameters]
                losses = []
                for sign in (1, -1):
                    for p, data, _, d in kept:
                        p.data[...] = data + sign * 1e-6 * d
                    losses.append(e.step(0, *batch).loss)
                for p, data, _, _ in kept:
                    p.data[...] = data
                slope = sum(float((g * d).sum()) for _, _, g, d in kept)
                assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


def test_the_gradient_is_that_of_the_mean_loss() -> None:
    assert_the_gradient_is_that_of_the_mean_loss()


def assert_each_step_begins_with_no_gradient() -> None:
    """The same batch twice, without a change of the weights in between, has the same gradient twice."""
    config = small(learning_rate=AT_ALL)
    with engine(config) as e:
        gradients = []
        for _ in range(2):
            e.step(0, *source_of(config)(0, e.share))
            gradients.append([p.grad.copy() for p in e.buckets.parameters])
        for once, twice in zip(*gradients, strict=True):
            np.testing.assert_array_equal(once, twice)


def test_each_step_begins_with_no_gradient() -> None:
    assert_each_step_begins_with_no_gradient()


def assert_every_step_has_masks_of_its_own() -> None:
    """The same batch and weights: another loss in another step, the same loss in the same step again."""
    for style in ("gpt", "llama"):
        config = small(style=style, dropout=0.3, learning_rate=AT_ALL)
        batch = source_of(config)(0, slice(0, 6))
        with engine(config) as e:
            losses = [e.step(step, *batch).loss for step in (0, 1, 2, 0)]
        assert losses[0] == losses[3]
        assert len(set(losses)) == 3


def test_every_step_has_masks_of_its_own() -> None:
    assert_every_step_has_masks_of_its_own()


def test_seed() -> None:
    first, again, other = (steps(small(dropout=0.1, seed=seed), None, 1)[0].loss for seed in (0, 0, 1))
    assert first == again != other


def test_rate() -> None:
    config = small(learning_rate=1.0, warmup=2, steps=4, final=0.5)
    assert [result.rate for result in steps(config, None, 5)] == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5])


@pytest.mark.mpi
def test_stop_is_agreed(world: Intracomm) -> None:
    for config in layouts(small(), world.size)[::3]:
        with engine(config, world) as e:
            batch = source_of(config)(0, e.share)
            for asking in (None, 0, world.size - 1):
                found = world.allgather(e.step(0, *batch, stop=world.rank == asking).stop)
                assert found == [asking is not None] * world.size


@pytest.mark.mpi
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_replicas_share_the_batch(world: Intracomm, batch: int) -> None:
    """As evenly as can be, every sample once, whatever the number of replicas; some may have none."""
    config = small(batch=batch, dp=world.size)
    with engine(config, world) as e:
        shares = world.allgather((e.share.start, e.share.stop))
    assert [i for start, stop in shares for i in range(start, stop)] == list(range(batch))
    assert max(b - a for a, b in shares) - min(b - a for a, b in shares) <= 1


def test_microbatches() -> None:
    def count(samples: int | None = None, **values: Any) -> int:
        with engine(small(batch=7, **values)) as e:
            return e.microbatches(samples)

    assert count() == 1
    assert [count(microbatch=n) for n in (1, 2, 3, 6, 7)] == [7, 4, 3, 2, 1]
    assert [count(samples=n, microbatch=2) for n in (1, 2, 3)] == [1, 1, 2]


@pytest.mark.mpi(min_size=2)
def test_microbatches_of_a_pipeline(world: Intracomm) -> None:
    """Four for each stage, as far as there are samples; the same number on every rank."""
    for batch, wanted in ((3, 3), (4 * world.size, 4 * world.size), (100, 4 * world.size)):
        with engine(small(batch=batch, pp=world.size), world) as e:
            assert e.microbatches() == wanted


@pytest.mark.mpi(min_size=2)
def test_uneven_microbatches_are_the_same_on_all_replicas(world: Intracomm) -> None:
    """Their number follows from the largest share; a smaller share has smaller ones, or empty ones."""
    config = small(batch=3 * world.size - 1, microbatch=1, dp=world.size)
    with engine(config, world) as e:
        inputs, targets, samples = source_of(config)(0, e.share)
        cut = e._cut(0, inputs, targets, samples, True)
        sizes = [len(m.place.samples) for m in cut if m.place.samples is not None]
        assert len(sizes) == 3 and sum(sizes) == len(samples)
        assert sizes == ([1, 1, 1] if len(samples) == 3 else [1, 1, 0])
        np.testing.assert_array_equal(np.concatenate([m.place.samples for m in cut]), samples)
        np.testing.assert_array_equal(np.concatenate([m.inputs for m in cut], 1), inputs)


def test_microbatches_of_an_evaluation_are_no_larger() -> None:
    """However many samples it has."""
    config = small(batch=6, microbatch=2)
    with engine(config) as e:
        for count in (1, 6, 16, 17):
            batch = source_of(small(batch=count))(0, slice(0, count))
            sizes = [len(m.place.samples) for m in e._cut(0, *batch, None, count) if m.place.samples is not None]
            assert sum(sizes) == count and max(sizes) <= 2


@pytest.mark.mpi
@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_evaluate(world: Intracomm, style: str) -> None:
    """The mean loss without dropout, the same on every rank and layout; weights and gradients are left alone."""
    config = small(style=style, dropout=0.5, batch=7, microbatch=2)
    source = source_of(config)
    with engine(small(style=style, learning_rate=AT_ALL, batch=7)) as serial:
        wanted = serial.step(0, *source(0, slice(0, 7))).loss  # no dropout here
    for layout in layouts(config, world.size):
        with engine(layout, world) as e:
            for bucket in e.buckets.buckets:
                bucket.grad[:] = 3
            before = [bucket.data.copy() for bucket in e.buckets.buckets]
            loss = e.evaluate(*source(0, e.share), batch=7)
            assert world.allgather(loss) == [loss] * world.size
            assert loss == pytest.approx(wanted, rel=1e-13), short(layout.layout)
            for bucket, data in zip(e.buckets.buckets, before, strict=True):
                np.testing.assert_array_equal(bucket.data, data)
                assert (bucket.grad == 3).all()


@pytest.mark.mpi
def test_evaluate_another_number_of_samples_than_a_step_has(world: Intracomm) -> None:
    config = small(batch=6, microbatch=2)
    inputs, targets, samples = source_of(small(batch=16))(0, slice(0, 16))
    with engine(config) as serial:
        wanted = serial.evaluate(inputs, targets, samples, 16)
    for layout in layouts(config, world.size)[::3]:
        with engine(layout, world) as e:
            share = e.mesh["dp"].part(16)
            assert e.evaluate(inputs[:, share], targets[:, share], samples[share], 16) == pytest.approx(
                wanted, rel=1e-13
            )


def test_shorter_sequences_than_the_longest() -> None:
    """A step takes what it is given: the loss is the mean over the positions that there are."""
    config = small(learning_rate=AT_ALL)
    inputs, targets, samples = source_of(config)(0, slice(0, 6))
    with engine(config) as e:
        whole = [e.evaluate(inputs[:n], targets[:n], samples, 6) * n for n in range(1, 6)]
        last = e.evaluate(inputs, np.where(np.arange(5)[:, None] == 4, targets, -1), samples, 6) * 5
    assert whole[4] - whole[3] == pytest.approx(last, rel=1e-12)


def test_architecture_is_that_of_the_configuration() -> None:
    config = small(style="llama", rope_theta=5.0, norm_epsilon=0.5)
    a = architecture(config)
    assert (a.rope_theta, a.norm_epsilon, a.heads, a.vocabulary) == (5.0, 0.5, 6, 19)
    with engine(config) as e:
        assert sum(p.data.size for p in e.buckets.parameters) == a.parameters


#: A small model that learns ``affine`` in 50 steps, with dropout, in float32.
CURVE: dict[str, Any] = {
    "layers": 2,
    "hidden": 32,
    "heads": 4,
    "kv_heads": 2,
    "head_size": 8,
    "ffn": 64,
    "vocabulary": 32,
    "sequence": 16,
    "batch": 8,
    "dropout": 0.1,
    "dtype": "float32",
    "steps": 50,
    "warmup": 10,
    "clip": 1.0,
}


def curve_deviation(world: Intracomm, style: str, rate: float, layout: str) -> float:
    """The largest relative difference of a layout's losses from the serial model's, over 50 steps."""
    config = small(**CURVE, style=style, learning_rate=rate)
    wanted = np.array([result.loss for result in steps(config, None, 50, affine(config))])
    assert wanted[-5:].mean() < 0.9 * wanted[0], "it does not learn"
    found = np.array([result.loss for result in steps(spread(config, layout, world.size), world, 50, affine(config))])
    return float(np.abs(found / wanted - 1).max())


@pytest.mark.mpi
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("style", "rate"), [("gpt", 1e-3), ("llama", 1e-2)])
def test_loss_curves_agree_in_float32(world: Intracomm, style: str, rate: float) -> None:
    """docs/verification.md says what was measured."""
    if world.size != 2:
        pytest.skip("two ranks show it")
    for layout in ("tp=2", "pp=2", "dp=2"):
        assert curve_deviation(world, style, rate, layout) <= 1e-6
