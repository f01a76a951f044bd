"""Whole models on one GPU: what NumPy computes, the same bits in every run, and a run of the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hpcmp import wgrad
from hpcmp.arrays import array_module, to_host
from hpcmp.comm.device import select_device
from hpcmp.cursor import Cursor, Place
from hpcmp.layers.loss import VocabularyParallelCrossEntropy
from hpcmp.layers.parallel import ModelParallel
from hpcmp.models.architecture import Architecture
from hpcmp.models.transformer import block, build
from hpcmp.module import Recompute
from hpcmp.testing import gradcheck
from hpcmp.training.verify import source_of
from tests.corpus import config, corpus
from tests.layouts import engine, small

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

GPT = Architecture("gpt", 2, 24, 6, 3, 4, 37, 101, 16, dropout=0.1)
LLAMA = dataclasses.replace(GPT, style="llama", tied=False, bias=False, dropout=0.0)


def gradients(a: Architecture, xp: ModuleType, dtype: Any, recompute: bool = False) -> dict[str, np.ndarray]:
    """The loss of one microbatch, and the gradient of every parameter, computed with ``xp``."""
    length, batch = 13, 3
    parallel = ModelParallel(cursor=Cursor(seed=5))
    parallel.cursor.place = Place(2, np.array([4, 0, 9]), length)
    model = build(a, parallel, wrap=(lambda block, _: Recompute(block)) if recompute else None)
    parameters = model.initialise(1, dtype, xp)
    draw = np.random.default_rng(0)
    tokens = xp.asarray(draw.integers(0, a.vocabulary, (length, batch)))
    targets = xp.asarray(draw.integers(-1, a.vocabulary, (length, batch)))
    loss = VocabularyParallelCrossEntropy(parallel, a.vocabulary)
    logits, saved = model.forward(tokens)
    total, kept = loss.forward((logits, targets))
    seen = logits.copy()  # the gradient is written over them
    model.backward(loss.backward(1 / (length * batch), kept, wgrad.now)[0], saved, wgrad.now)
    found = {"logits": seen, "loss": total} | {p.name: p.grad for p in parameters}
    assert all(array_module(array) is xp for array in found.values())
    return {name: to_host(array) for name, array in found.items()}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("a", [GPT, LLAMA], ids=["gpt", "llama"])
def test_a_step_is_numpys(a: Architecture, recompute: bool) -> None:
    import cupy

    wanted = gradients(a, np, np.float64)
    for dtype, tolerance in ((np.float64, 1e-11), (np.float32, 1e-4)):
        found = gradients(a, cupy, dtype, recompute)
        for name, x in wanted.items():
            np.testing.assert_allclose(found[name], x, rtol=0, atol=tolerance * np.abs(x).max(), err_msg=name)


@pytest.mark.parametrize("a", [GPT, LLAMA], ids=["gpt", "llama"])
def test_a_step_is_the_same_in_every_run(a: Architecture) -> None:
    import cupy

    first = gradients(a, cupy, np.float32)
    for _ in range(3):
        again = gradients(a, cupy, np.float32)
        assert not [name for name in first if not np.array_equal(first[name], again[name])]


@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_the_optimizer_steps_as_numpy(style: str) -> None:
    results, weights = [], []
    for device in ("cpu", "cuda"):
        c = small(style=style, device=device, dropout=0.1, microbatch=4)
        source = source_of(c)
        with engine(c) as e:
            steps = [dataclasses.astuple(e.step(i, *source(i, e.share))) for i in range(3)]
            results.append([*steps, (e.evaluate(*source(3, e.share), 6),)])
            weights.append([to_host(p.data) for p in e.buckets.parameters])
    for here, there in zip(*results, strict=True):
        assert here == pytest.approx(there, rel=1e-11)
    for here, there in zip(*weights, strict=True):
        np.testing.assert_allclose(here, there, rtol=0, atol=1e-11)


def test_gradients_are_central_differences() -> None:
    import cupy

    parallel = ModelParallel(cursor=Cursor(seed=5))
    parallel.cursor.place = Place(2, np.array([4, 0]), 5)
    x = cupy.asarray(np.random.default_rng(0).standard_normal((5, 2, GPT.hidden)))
    gradcheck(block(GPT, parallel, "block"), x)


def test_the_command_trains_on_the_gpu_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hpcmp.cli import main

    toml = config(tmp_path, corpus(tmp_path))

    def run(name: str, *overrides: str) -> dict[str, Any]:
        common = [f"run.directory={tmp_path / name}", "train.dtype=float64"]
        assert main(["train", str(toml), *common, *overrides, "--json"]) in (0, 75)
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    host, gpu = run("host"), run("gpu", "train.device=cuda")
    assert gpu["loss"] == pytest.approx(host["loss"], rel=1e-9)
    assert gpu["held_out_loss"] == pytest.approx(host["held_out_loss"], rel=1e-9)
    run("parts", "train.device=cuda", "train.steps=3")
    assert run("parts", "train.device=cuda")["loss"] == gpu["loss"]


def test_a_gpu_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    from hpcmp.errors import InputError

    device = select_device(0, lambda value: [value])
    assert cupy.cuda.Device().id == device.index == 0 and device.name and not device.shared
    many = cupy.cuda.runtime.getDeviceCount() + 1
    monkeypatch.delenv("HPCMP_SHARE_GPU", raising=False)
    with pytest.raises(InputError, match=f"{many} ranks on host .* HPCMP_SHARE_GPU=1"):
        select_device(0, lambda value: [value] * many)
    monkeypatch.setenv("HPCMP_SHARE_GPU", "1")
    assert select_device(0, lambda value: [value] * many).shared
