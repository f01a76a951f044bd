"""Training in FP8: as good as without, on every layout; going on from a checkpoint; weights that are never stale."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.checkpoint import open_checkpoint
from hpcmp.cli import main
from hpcmp.errors import InputError
from hpcmp.kernels import fp8
from hpcmp.kernels.cuda import libraries
from hpcmp.training.config import Config, load_config
from hpcmp.training.engine import Engine
from hpcmp.training.fp8 import misfits
from hpcmp.training.metrics import greet
from hpcmp.training.trainer import Trainer
from hpcmp.training.verify import resolve, source_of, verify
from tests.kernels.emulation.backend import needs_gxx
from tests.kernels.emulation.capture import Device, on_device
from tests.layouts import engine, small, spread
from tests.test_captured import captured_engine, differences, tiny, train
from tests.training.test_engine import CURVE, affine
from tests.training.test_precision import MODEL, overflow

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

SCALINGS = ["current", "delayed"]


def losses(config: Config, steps: int, evaluations: bool = False) -> np.ndarray[Any, Any]:
    with engine(config) as e:
        source, found = affine(config), []
        for step in range(steps):
            if evaluations:
                inputs, targets, samples = source(step + 99, slice(0, 8))
                e.evaluate(inputs * 0, targets, samples, 8)
            found.append(e.step(step, *source(step, e.share)).loss)
        return np.array(found)


@pytest.mark.parametrize(("style", "rate", "limits"), [("gpt", 1e-3, (3e-3, 1e-3)), ("llama", 1e-2, (5e-2, 5e-3))])
def test_a_model_learns_as_in_float32(style: str, rate: float, limits: tuple[float, float]) -> None:
    """Over 80 steps, in bfloat16: the furthest loss from float32's, and the mean of the last 20. Measured: GPT style
    7.6e-4 and 1e-4, Llama style 1.5e-2 and 1e-3."""
    settings = CURVE | {"steps": 80, "style": style, "learning_rate": rate}
    wanted = losses(small(**settings), 80)
    assert wanted[-20:].mean() < 0.75 * wanted[0], "it does not learn"
    for scaling in SCALINGS:
        found = losses(small(**settings | {"dtype": "bfloat16"}, fp8=scaling), 80)
        assert 1e-4 < np.abs(found / wanted - 1).max() <= limits[0]
        assert abs(found[-20:].mean() / wanted[-20:].mean() - 1) <= limits[1]


LAYOUTS = {
    1: ["dp=1,micro=3,offload=activations", "dp=1,recompute=activations", "dp=1,recompute=full"],
    2: ["tp=2,sp=1", "pp=2,micro=2,recompute=activations,offload=activations", "dp=2,zero=1", "dp=2,zero=3", "cp=2"],
    3: ["tp=3,sp=1", "pp=3,micro=2,recompute=attention", "dp=3,zero=2"],
    4: ["tp=2,pp=2,micro=2,schedule=zb-h1", "dp=2,tp=2,zero=2,recompute=full", "tp_y=2,dp=2", "tp_z=2,tp=2"],
    8: ["dp=2,pp=2,tp=2,micro=2,schedule=zb-h1,zero=1", "dp=8,zero=3"],
}


@pytest.mark.mpi
@pytest.mark.parametrize(("scaling", "dtype"), [("current", "bfloat16"), ("delayed", "float32")])
def test_a_layout_agrees_with_the_serial_run(world: Intracomm, scaling: str, dtype: str) -> None:
    """dp, pp and ZeRO round the same numbers. In others a sum that is made in parts may fall to the next of 8 bits, and
    where key-value heads are read by several ranks each rounds its own part."""
    base = small(**MODEL, style="llama", dtype=dtype, fp8=scaling)
    configs = [spread(base, text) for text in LAYOUTS[world.size]]
    for report in verify(configs, world, source_of(base), steps=2):  # one of them by what the other left
        same = not any(f"{axis}=2" in report.layout or "tp=3" in report.layout for axis in ("tp", "cp", "tp_y"))
        gradient, norm, loss = (1e-4, 1e-6, 1e-6) if same else (0.4, 5e-3, 2e-4)
        assert max(p.gradient for p in report.parameters) <= gradient, report.layout
        assert report.norm <= norm and report.loss <= loss, report.layout


def stale(e: Engine) -> list[str]:
    """The weights whose codes are not those of what they are now."""
    found = []
    for p in e.buckets.parameters:
        if p.data is not None and p.derived is not None and p.derived[0] == p.version:
            factor = p.derived[1]
            flat = p.data.reshape(factor.codes.shape)
            largest = np.zeros(1, np.float32)
            fp8.add_amax(largest, flat)
            fresh = fp8.quantise(flat, largest, "e4m3", True, True)
            kept = factor.codes, factor.turned, factor.inverse
            found += [p.name] * any((a != b).any() for a, b in zip(fresh, kept, strict=True))
    return found


@pytest.mark.mpi
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_weights_are_never_stale(world: Intracomm, zero: int) -> None:
    """After each step, and after others have taken their place; and histories are the same on all ranks."""
    config = spread(small(**MODEL, dtype="float32", fp8="delayed"), f"dp={world.size},zero={zero},micro=1")
    with engine(config, world) as e:
        source, checked = source_of(config), 0
        for step in range(3):
            e.step(step, *source(step, e.share))
            assert not stale(e)
            e.parallel.products.begin()
            current = [p for p in e.buckets.parameters if p.derived is not None and p.derived[0] == p.version]
            checked += len(current)
            assert not stale(e)
        assert checked == (3 * 5 * 3 if zero < 3 else checked)  # steps, matrices of a block, blocks
        e.buckets.initialise(9)
        e.parallel.products.begin()
        assert not stale(e)
        histories = [array.copy() for _, array in e.parallel.products.state()]
        for other in e.mesh.gather_objects(histories):
            for a, b in zip(histories, other, strict=True):
                np.testing.assert_array_equal(a, b)
                assert a[:, :3].all() and not a[:, 3:].any()


def test_a_stale_weight_would_be_found() -> None:
    config = small(**MODEL, dtype="bfloat16", fp8="current")
    with engine(config) as e:
        e.step(0, *source_of(config)(0, e.share))
        e.parallel.products.begin()
        weight = next(p for p in e.buckets.parameters if p.derived is not None)
        weight.data *= 1.5
        assert stale(e) == [weight.name]
        weight.version += 1
        e.parallel.products.begin()
        assert not stale(e)


@pytest.mark.mpi
def test_histories_are_of_the_whole_tensor(world: Intracomm) -> None:
    """Whatever the ranks share of it."""
    config = small(**MODEL | {"dropout": 0.0}, style="llama", dtype="float32", fp8="delayed")
    expected: dict[str, Any] = {}
    for text in ("dp=1", f"dp={world.size},micro=1", f"tp={world.size},sp=1", f"cp={world.size}"):
        comm = None if text == "dp=1" else world
        with engine(spread(config, text), comm) as e:
            source = source_of(config)
            for step in range(2):
                e.step(step, *source(step, e.share))
            found = {name: array.copy() for name, array in e.parallel.products.state()}
        if not expected:
            expected = found
        assert set(found) == set(expected) and len(found) == 4 * 3
        for name, history in found.items():
            rows = slice(0, 2) if "query" in name and text.startswith("tp") else slice(None)  # parts of dy of key_value
            np.testing.assert_allclose(history[rows], expected[name][rows], rtol=0.2, err_msg=f"{text} {name}")


@pytest.mark.parametrize("scaling", SCALINGS)
def test_an_evaluation_changes_nothing(scaling: str) -> None:
    config = small(**CURVE | {"steps": 9, "warmup": 2}, fp8=scaling)
    np.testing.assert_array_equal(losses(config, 9, evaluations=True), losses(config, 9))


def test_a_step_that_is_skipped_leaves_the_histories_alone() -> None:
    config = small(**MODEL, dtype="float16", loss_scale=1024.0, fp8="delayed")
    with engine(config) as e:
        source = source_of(config)
        e.step(0, *source(0, e.share))
        before = [array.copy() for _, array in e.parallel.products.state()]
        end = overflow(e, 0)
        assert e.step(1, *source(1, e.share)).skipped
        end()
        for (_, array), was in zip(e.parallel.products.state(), before, strict=True):
            np.testing.assert_array_equal(array, was)
        assert not e.step(2, *source(2, e.share)).skipped


def test_a_step_queued_behind_a_bad_one_leaves_no_trace() -> None:
    """Taken again, it is what it would have been, histories included."""
    config = small(**MODEL, dtype="float32", fp8="delayed")
    found = []
    for ahead in (False, True):
        with engine(config) as e:
            source = source_of(config)
            e.step(0, *source(0, e.share))
            end = overflow(e, 0)
            bad = e.begin(1, *source(1, e.share))
            end()
            if ahead:
                e.begin(2, *source(2, e.share))
            assert bad.result().trouble
            losses = [e.step(step, *source(step, e.share)).loss for step in (2, 3)]
            found.append([np.array(losses), *(array.copy() for _, array in e.parallel.products.state())])
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(a[:, :3].all() and not a[:, 3:].any() for a in found[0][1:])


def test_an_infinity_is_not_hidden() -> None:
    """One in an activation is one in the loss: the largest code would not be."""
    config = small(**MODEL | {"dropout": 0.0}, dtype="float32", fp8="current")
    with engine(config) as e:
        table = next(p for p in e.buckets.parameters if p.name == "blocks/1/mlp/norm/weight")
        table.data[0] = np.inf
        assert e.step(0, *source_of(config)(0, e.share)).trouble


SIXTEEN: dict[str, Any] = {"hidden": 16, "head_size": 8, "ffn": 32, "sequence": 8, "layers": 1, "dtype": "bfloat16"}


@needs_gxx
@pytest.mark.timeout(300)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_cuda_does_as_numpy_with_graphs_and_without(scaling: str) -> None:
    """In emulation: of sizes that cuBLASLt multiplies; with graphs bit for bit, though weights are quantised once a
    step, and graphs replayed in all microbatches and in an evaluation."""
    config = tiny(**SIXTEEN, fp8=scaling)
    assert not differences(config, steps=3)
    wanted, found = losses(config, 3), losses_on_device(config, 3)
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


@needs_gxx
def test_a_graph_that_was_captured_in_an_evaluation_notes_magnitudes() -> None:
    """Of the only microbatch of a step: it runs as it is in the first, and is captured after that."""
    config = tiny(**SIXTEEN | {"microbatch": 4}, fp8="delayed")
    found = []
    for graphs in (False, True):
        with captured_engine(config) if graphs else on_device_engine(config) as (e, device):
            train(e, config, 3)
            assert bool(device.graphs) == graphs
            found.append([np.array(array) for _, array in e.parallel.products.state()])
    assert len(found[0]) == 4
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a[:, :3].all()


@contextlib.contextmanager
def on_device_engine(config: Config) -> Iterator[tuple[Engine, Device]]:
    with on_device() as device, engine(config) as e:
        yield e, device


def losses_on_device(config: Config, steps: int) -> np.ndarray[Any, Any]:
    with on_device():
        return losses(config, steps)


def run(toml: Path, world: Intracomm, name: str, steps: int, *given: str) -> tuple[list[float], dict[str, Any]]:
    """The losses up to a step, where a checkpoint is made; and what that holds."""
    settings = [f"run.directory={toml.parent / name}", "train.dtype=bfloat16", f"train.steps={steps}", *given]
    settings += ["optimizer.decay_steps=9", "optimizer.warmup=2"]
    with Trainer(load_config(toml, settings), world) as trainer:
        found = [result.loss for result in trainer]
        trainer.save()
        content = open_checkpoint(toml.parent / name / "checkpoints", trainer.engine.mesh)
        held = {tensor: content.read(tensor) for tensor in content.tensors}
    world.Barrier()
    return found, held


@pytest.mark.mpi(min_size=2)
def test_a_run_goes_on_bit_for_bit(world: Intracomm, toml: Path) -> None:
    """With its histories: without, as with "current", nothing is there to go wrong that is not here too."""
    if world.size not in (2, 4):
        pytest.skip("tp on two ranks, pp and dp on four")
    given = ["train.fp8=delayed", f"layout.{'tp' if world.size == 2 else 'pp'}=2"]
    whole, expected = run(toml, world, "whole", 4, *given)
    first, _ = run(toml, world, "parts", 2, *given)
    second, held = run(toml, world, "parts", 4, *given)
    assert [*first, *second] == whole and len(second) == 2
    assert set(held) == set(expected) and any(name.startswith("fp8/") for name in held)
    for name, value in expected.items():
        np.testing.assert_array_equal(held[name], value, err_msg=name)


@pytest.mark.mpi
def test_a_run_goes_on_with_another_scaling(world: Intracomm, toml: Path) -> None:
    """Histories begin anew after steps that left none, and those that nobody needs are not read."""
    if world.size > 1:
        pytest.skip("the same on any layout")
    for name, before, after in (("anew", "none", "delayed"), ("left", "delayed", "current")):
        run(toml, world, name, 1, f"train.fp8={before}")
        found, held = run(toml, world, name, 3, f"train.fp8={after}")
        histories = [value for key, value in held.items() if key.startswith("fp8/")]
        assert len(found) == 2 and bool(histories) == (after == "delayed")
        assert all(h[:, :2].all() and not h[:, 2:].any() for h in histories)


def eight(**settings: Any) -> Config:
    """Of sizes that are multiples of 16, on any of two ranks."""
    sizes = {"hidden": 64, "heads": 4, "kv_heads": 2, "head_size": 16, "ffn": 96, "sequence": 32, "batch": 4}
    layout = {key: settings.pop(key) for key in ("tp", "tp_y", "cp", "pp", "dp", "ulysses") if key in settings}
    config = small(**MODEL | sizes | settings, fp8="current", device="cuda", dtype="bfloat16")
    return spread(config, ",".join(f"{key}={number}" for key, number in layout.items()) or "dp=1")


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, []),
        ({"tp": 2, "batch": 3}, []),
        ({"batch": 3, "sequence": 8}, ["tokens of a microbatch (24)"]),
        ({"dp": 2, "batch": 3, "sequence": 8}, ["tokens of a microbatch (8)"]),
        ({"pp": 2, "sequence": 24, "layers": 2}, ["tokens of a microbatch (24)"]),
        ({"cp": 2, "sequence": 21, "batch": 1}, ["tokens of a microbatch (10 or 11)"]),
        ({"cp": 2, "ulysses": 2, "sequence": 33, "batch": 1}, ["tokens of a microbatch (17)"]),
        ({"tp_y": 2, "hidden": 72}, ["hidden of a rank (36)"]),
        ({"head_size": 4, "heads": 6}, ["queries of a rank (24)"]),
        ({"tp": 3, "ffn": 64}, ["ffn of a rank (21 or 22)"]),
        ({"tp": 4, "ffn": 100}, ["ffn of a rank (25)"]),
        ({"ffn": 100, "experts": 2}, []),
        ({"ffn": 100, "experts": 2, "experts_every": 2}, ["ffn of a rank (100)"]),
    ],
)
def test_sizes_that_are_not_multiplied_in_8_bits(settings: dict[str, Any], found: list[str]) -> None:
    assert misfits(eight(**settings)) == found


def test_the_log_says_what_multiplies(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level("INFO")
    with engine(small(**MODEL, dtype="bfloat16", fp8="current")) as e:
        greet(e)
        monkeypatch.setattr(libraries, "cublaslt", lambda: libraries.Library("13.1.0"))
        for number in (90, 80):
            monkeypatch.setattr(libraries, "capability", lambda number=number: number)
            e.config = eight()
            greet(e)
    said = [(r.levelname, r.getMessage()) for r in caplog.records if "train.fp8" in r.getMessage()]
    assert [level for level, _ in said] == ["WARNING", "INFO", "WARNING"]
    for (_, text), end in zip(
        said, ("slower than without", "cuBLASLt multiplies 8 bits", "come with 8.9"), strict=True
    ):
        assert text.endswith(end)


def test_float64_is_refused_and_verify_ignores_fp8() -> None:
    with pytest.raises(InputError, match=r'train.fp8 = "delayed" does not go with train.dtype = "float64"'):
        small(fp8="delayed")
    config = resolve(small(**CURVE, fp8="delayed"))
    assert (config.train.fp8, config.train.dtype) == ("none", "float64")


def test_verify_says_that_it_computes_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.toml").write_text("model.layers = 1\nmodel.hidden = 8\nmodel.vocabulary = 7\ntrain.batch = 2\n")
    for given, end in ([], "in float64"), (["train.fp8=delayed"], "in float64, without train.fp8"):
        assert main(["verify", str(tmp_path / "x.toml"), "model.sequence=4", "model.heads=2", *given]) == 0
        assert capsys.readouterr().out.rstrip().endswith(end)
