"""Training in 16 bits: as good as in 32, the same on every layout to rounding; the loss scale of float16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.arrays import to_host
from hpcmp.checkpoint import open_checkpoint
from hpcmp.errors import HpcmpError
from hpcmp.training.config import Config, load_config
from hpcmp.training.engine import Engine, Result
from hpcmp.training.scaler import LossScale
from hpcmp.training.trainer import Trainer
from hpcmp.training.verify import source_of, verify
from tests.layouts import engine, small, spread
from tests.training.test_engine import CURVE, affine

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

#: Sums of enough numbers to be worth their name.
MODEL: dict[str, Any] = {
    "layers": 3,
    "hidden": 32,
    "heads": 4,
    "kv_heads": 2,
    "head_size": 8,
    "ffn": 48,
    "vocabulary": 61,
    "sequence": 16,
    "batch": 8,
    "dropout": 0.1,
}

#: (largest difference of a gradient, of the norm, of the loss) where a layout adds up in another order, relative to the
#: serial run in the same format. Measured: bfloat16 2.6e-2, 1e-3, 3e-5; float16 2.3e-2, 3e-4, 4e-5.
BOUNDS = {"bfloat16": (8e-2, 5e-3, 2e-4), "float16": (6e-2, 2e-3, 2e-4)}


def losses(config: Config, world: Intracomm | None = None, steps: int = 30) -> np.ndarray[Any, Any]:
    with engine(config, world) as e:
        source = affine(config)
        return np.array([e.step(step, *source(step, e.share)).loss for step in range(steps)])


@pytest.mark.parametrize(("style", "rate"), [("gpt", 1e-3), ("llama", 1e-2)])
@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 4e-3), ("float16", 1e-3)])
def test_a_model_learns_as_in_float32(style: str, rate: float, dtype: str, limit: float) -> None:
    """Over 30 steps no loss is further off than measured: bfloat16 1.3e-3, float16 2.2e-4 (Llama style)."""
    settings = CURVE | {"steps": 30, "style": style, "learning_rate": rate}
    wanted = losses(small(**settings))
    assert wanted[-5:].mean() < 0.9 * wanted[0], "it does not learn"
    assert np.abs(losses(small(**settings | {"dtype": dtype})) / wanted - 1).max() <= limit


LAYOUTS = {
    2: ["tp=2,sp=1", "pp=2,micro=2,recompute=activations,offload=activations", "dp=2,zero=3", "cp=2", "tp_y=2"],
    3: ["tp=3,sp=1", "pp=3,micro=2,recompute=attention", "dp=3,zero=1"],
    4: ["tp=2,pp=2,micro=2,schedule=zb-h1", "dp=2,tp=2,zero=2,recompute=full", "cp=4,ulysses=2", "tp_z=2,tp=2"],
}


@pytest.mark.mpi
@pytest.mark.parametrize("style", ["gpt", "llama"])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_layout_agrees_with_the_serial_run(world: Intracomm, style: str, dtype: str) -> None:
    base = small(**MODEL, style=style, dtype=dtype)
    configs = [spread(base, text) for text in LAYOUTS.get(world.size, [f"dp={world.size},micro=1"])]
    gradient, norm, loss = BOUNDS[dtype]
    for report in verify(configs, world, source_of(base)):
        assert max(p.gradient for p in report.parameters) <= gradient, report.layout
        assert report.norm <= norm and report.loss <= loss, report.layout


@pytest.mark.mpi(min_size=2)
def test_experts_agree_with_the_serial_run(world: Intracomm) -> None:
    if world.size == 2:
        base = small(**MODEL, dtype="bfloat16", experts=4)
        for report in verify([spread(base, "dp=2,ep=2")], world, source_of(base)):
            assert report.worst <= 8e-2


def test_formats() -> None:
    """Weights have 16 bits; gradients, master weights and moments 32."""
    for dtype in ("bfloat16", "float16"):
        with engine(small(**MODEL, dtype=dtype)) as e:
            e.step(0, *source_of(e.config)(0, e.share))
            assert {p.data.dtype.name for p in e.buckets.parameters} == {dtype}
            wide = [p.grad for p in e.buckets.parameters] + [b.master for b in e.buckets.buckets]
            assert {a.dtype.name for a in [*wide, *(state for _, _, state in e.optimizer.state())]} == {"float32"}


def assert_small_updates_are_not_lost() -> None:
    """A hundred steps, each too small for a 16-bit weight to show, move it: the masters add them up."""
    config = small(**MODEL | {"dropout": 0.0}, dtype="bfloat16", learning_rate=1e-6, warmup=0, decay_steps=10**6)
    with engine(config) as e:
        before = {p.name: p.data.copy() for p in e.buckets.parameters}
        source = source_of(config)
        for step in range(100):
            e.step(step, *source(0, e.share))
        table = next(p for p in e.buckets.parameters if p.name == "blocks/0/mlp/up/weight")
        moved = np.abs(table.data.astype(np.float32) - before[table.name].astype(np.float32))
        assert (moved > 0).mean() > 0.3
        assert moved.mean() == pytest.approx(1e-4, rel=0.3)  # 100 steps of Adam at 1e-6


def test_small_updates_are_not_lost() -> None:
    assert_small_updates_are_not_lost()


def assert_the_gradient_does_not_depend_on_the_scale() -> None:
    """Norm, clipping and step are those of the loss itself, whatever the loss scale."""
    runs = []
    for scale in (1.0, 4096.0):
        config = small(**MODEL, dtype="float32", loss_scale=scale, clip=0.1, name="sgd", experts=4, balance_loss=0.5)
        with engine(config) as e:
            results = [e.step(step, *source_of(config)(step, e.share)) for step in range(3)]
            runs.append(([r.norm for r in results], [to_host(b.master).copy() for b in e.buckets.buckets]))
    (norms, weights), (scaled_norms, scaled_weights) = runs
    assert min(norms) > 0.1  # clipping takes part
    np.testing.assert_allclose(scaled_norms, norms, 1e-6)
    for a, b in zip(scaled_weights, weights, strict=True):
        np.testing.assert_allclose(a, b, 1e-5, 1e-7)


def test_the_gradient_does_not_depend_on_the_scale() -> None:
    assert_the_gradient_does_not_depend_on_the_scale()


def test_the_scale_saves_small_gradients() -> None:
    """2^-12 of it, as of a batch 4096 times as large, float16 loses in part."""
    norms = {}
    for dtype, scale in (("float32", 1.0), ("float16", 2.0**-12), ("float16", 65536.0)):
        config = small(**MODEL, dtype=dtype, loss_scale=scale)
        with engine(config) as e:
            norms[dtype, scale] = e.step(0, *source_of(config)(0, e.share)).norm
    wanted = norms["float32", 1.0]
    assert norms["float16", 65536.0] == pytest.approx(wanted, rel=1e-3)
    assert norms["float16", 2.0**-12] != pytest.approx(wanted, rel=1e-2)


def test_loss_scale() -> None:
    s = LossScale(8.0, window=3, dynamic=True)
    begun = [s.begun() for _ in range(4)]
    assert begun == [(8, 0), (8, 1), (8, 2), (16, 0)] and s.now == (16, 1)
    assert s.overflowed(begun[1]) and s.now == (4, 0)  # what was begun after it does not count
    again = LossScale(1.0, window=3, dynamic=True)
    again.load(s.state())
    assert [again.begun().scale for _ in range(3)] == [4, 4, 4] and again.scale == 8
    assert [again.overflowed(again.begun()) for _ in range(4)] == [True, True, True, False] and again.scale == 1
    constant = LossScale(16.0)
    assert not constant.overflowed(constant.begun()) and constant.now == (16, 0)
    constant.load({"scale": 2.0, "good": 1})
    assert constant.scale == 16


def overflow(e: Engine, rank: int) -> Callable[[], None]:
    """Have rank ``rank``'s gradient hold an infinity in every step; returns what ends it."""
    zero = e.buckets.zero

    def plant() -> None:
        zero()
        for bucket in e.buckets.buckets if e.mesh.rank == rank else ():
            (bucket.grad if bucket.full is None else bucket.full)[:1] = np.inf

    e.buckets.zero = plant  # type: ignore[method-assign]
    return lambda: setattr(e.buckets, "zero", zero)


def assert_an_overflow_on_one_rank_is_one_on_all(world: Intracomm | None = None) -> None:
    """All skip the step, halve the scale and go on from the same weights."""
    size = 1 if world is None else world.size
    for text in (f"dp={size}", f"tp={size}", f"pp={size},micro=2", f"dp={size},zero=2"):
        config = spread(small(**MODEL | {"layers": 8}, dtype="float16", loss_scale=1024.0), text)
        with engine(config, world) as e:
            source = source_of(config)
            e.step(0, *source(0, e.share))
            before, steps = [b.master.copy() for b in e.buckets.buckets], e.optimizer.steps
            end = overflow(e, size - 1)
            result = e.step(1, *source(1, e.share))
            end()
            seen = e.mesh.gather_objects((result.skipped, e.loss_scale.state(), e.optimizer.steps))
            assert seen == [(True, {"scale": 512.0, "good": 0}, steps)] * size, text
            for bucket, master in zip(e.buckets.buckets, before, strict=True):
                np.testing.assert_array_equal(bucket.master, master)
            good = e.step(2, *source(2, e.share))
            assert not good.skipped and np.isfinite(good.norm)
            assert e.mesh.gather_objects(e.loss_scale.state()) == [{"scale": 512.0, "good": 1}] * size


@pytest.mark.mpi
def test_an_overflow_on_one_rank_is_one_on_all(world: Intracomm) -> None:
    assert_an_overflow_on_one_rank_is_one_on_all(world)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_formats_skip_nothing(dtype: str) -> None:
    with engine(small(**MODEL, dtype=dtype)) as e:
        overflow(e, 0)
        result = e.step(0, *source_of(e.config)(0, e.share))
        assert not np.isfinite(result.norm) and not result.skipped


def run(toml: Path, world: Intracomm | None, name: str, *given: str, plant: Any = None) -> list[Result]:
    """The steps of a run; ``plant(trainer)`` is called before each."""
    settings = [f"run.directory={toml.parent / name}", "train.dtype=float16", *given]
    with Trainer(load_config(toml, settings), world) as trainer:
        begin = trainer.engine.begin

        def planted(*args: Any, **kwargs: Any) -> Any:
            if plant is not None:
                plant(trainer)
            return begin(*args, **kwargs)

        trainer.engine.begin = planted  # type: ignore[method-assign]
        results = list(trainer)
        trainer.save()
    return results


@pytest.mark.mpi
def test_a_run_goes_on_with_its_scale_and_its_masters(world: Intracomm, toml: Path) -> None:
    if world.size > 2:
        pytest.skip("two ranks show it")
    window = "train.loss_scale_window=2"
    whole = run(toml, world, "whole", window, "train.loss_scale=4")
    parts = run(toml, world, "parts", window, "train.loss_scale=4", "train.steps=3")
    parts += run(toml, world, "parts", window, "train.loss_scale=4")
    assert [r.loss for r in parts] == [r.loss for r in whole] and len(whole) == 6
    if world.rank == 0:
        first, last = (open_checkpoint(toml.parent / n / "checkpoints" / "step_00000006") for n in ("whole", "parts"))
        assert last.state["loss_scale"] == {"scale": 32.0, "good": 0} == first.state["loss_scale"]
        for name, (_, dtype) in first.tensors.items():
            assert dtype == (np.uint8 if name == "tokenizer" else np.float32)
            np.testing.assert_array_equal(first.read(name), last.read(name))


@pytest.mark.mpi
def test_overflow_skips_and_not_a_number_ends_the_run(world: Intracomm, toml: Path) -> None:
    if world.size > 2:
        pytest.skip("two ranks show it")

    def once(trainer: Trainer) -> None:
        trainer.engine.buckets.__dict__.pop("zero", None)
        if trainer.step == 2:
            overflow(trainer.engine, 0)

    results = run(toml, world, "once", plant=once)
    assert [r.skipped for r in results] == [False, False, True, False, False, False]
    for always in (["train.loss_scale=8"], ["train.dtype=bfloat16"]):
        with pytest.raises(HpcmpError, match="gradient norm"):
            run(toml, world, "always" + always[0][-1], *always, plant=lambda t: overflow(t.engine, 0))
