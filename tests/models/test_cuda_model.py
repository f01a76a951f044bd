"""Whole models on the CUDA kernels, which run on the CPU: what NumPy computes. tests/gpu has the same on a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import pytest

from hpcmp import kernels, wgrad
from hpcmp.arrays import Array, dtype_of, is_half
from hpcmp.cursor import Cursor, Place
from hpcmp.layers.context import documents
from hpcmp.layers.loss import VocabularyParallelCrossEntropy
from hpcmp.layers.parallel import ModelParallel
from hpcmp.models.architecture import Architecture
from hpcmp.models.transformer import build
from hpcmp.training.verify import source_of
from tests.kernels.emulation.backend import emulated, needs_gxx
from tests.layouts import engine, small

pytestmark = [needs_gxx, pytest.mark.timeout(300)]  # g++ builds what has changed

GPT = Architecture("gpt", 2, 24, 6, 3, 4, 37, 101, 16, dropout=0.1)
LLAMA = dataclasses.replace(GPT, style="llama", tied=False, bias=False, dropout=0.0, hidden=32, ffn=40)
MOE = dataclasses.replace(LLAMA, experts=5, expert_ffn=24, capacity=1.2, balance_loss=0.01, shared_experts=1)
WIDE = dataclasses.replace(GPT, ffn=40)  # a multiple of 8: cuBLASLt's epilogues
MODELS = {"gpt": GPT, "gpt with epilogues": WIDE, "llama": LLAMA, "moe": MOE}


@contextlib.contextmanager
def on_cuda() -> Iterator[None]:
    """NumPy arrays have the kernels that CuPy's have."""

    def of(x: Array) -> Any:
        return kernels.CUDA_HALF if is_half(x.dtype) else kernels.CUDA

    with emulated(), mock.patch.object(kernels, "of", of):
        yield


def step(a: Architecture, dtype: Any, begins: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The logits and the loss of one microbatch, and the gradient of every parameter. begins: where documents that are
    kept apart begin."""
    length, batch = 13, 3
    parallel = ModelParallel(cursor=Cursor(seed=5))
    parallel.cursor.place = Place(2, np.array([4, 0, 9]), length)
    if begins is not None:
        apart = documents(parallel, begins, np)
        parallel.cursor.place = dataclasses.replace(parallel.cursor.place, documents=apart)
    model = build(a, parallel)
    parameters = model.initialise(1, dtype)
    draw = np.random.default_rng(0)
    tokens, targets = draw.integers(0, a.vocabulary, (length, batch)), draw.integers(-1, a.vocabulary, (length, batch))
    loss = VocabularyParallelCrossEntropy(parallel, a.vocabulary)
    logits, saved = model.forward(tokens)
    total, kept = loss.forward((logits, targets))
    seen = logits.copy()  # the gradient is written over them
    model.backward(loss.backward(1 / (length * batch), kept, wgrad.now)[0], saved, wgrad.now)
    return {"logits": seen, "loss": np.asarray(total)} | {p.name: p.grad for p in parameters}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_that_of_the_cpus_kernels(name: str, dtype: str) -> None:
    compare(MODELS[name], dtype)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_documents_are_kept_apart(name: str, dtype: str) -> None:
    ends = (1, 2, 13), (13,), (4, 8, 12, 13)
    begins = np.array([sum(([a] * (e - a) for a, e in pairwise((0, *one))), []) for one in ends], np.int32)
    compare(MODELS[name], dtype, begins)


def compare(a: Architecture, dtype: str, *begins: np.ndarray) -> None:
    wanted = step(a, dtype_of(dtype), *begins)
    with on_cuda():
        found = step(a, dtype_of(dtype), *begins)
    tolerance = {"float64": 1e-11, "float32": 1e-4, "bfloat16": 0.06, "float16": 0.01}[dtype]
    for key, x in wanted.items():
        scale = np.abs(x.astype(np.float64)).max()
        assert found[key].dtype == x.dtype, key
        error = np.abs(found[key].astype(np.float64) - x.astype(np.float64)).max(initial=0)
        assert error <= tolerance * scale, (key, error / scale)
    assert any((found[key] != x).any() for key, x in wanted.items())  # other kernels round otherwise


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb", "muon"])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_steps_of_an_optimizer_are_those_of_the_cpus_kernels(optimizer: str, dtype: str) -> None:
    c = small(microbatch=3, dtype=dtype, name=optimizer, style="llama" if optimizer == "lamb" else "gpt", dropout=0.1)
    results = []
    for where in (contextlib.nullcontext(), on_cuda()):
        with where, engine(c) as e:
            source = source_of(c)
            losses = [e.step(i, *source(i, e.share)).loss for i in range(3)]
            results.append((losses, [np.array(p.data, np.float64) for p in e.buckets.parameters]))
    tolerance = 1e-9 if dtype == "float64" else 0.03
    (here, weights), (there, others) = results
    assert there == pytest.approx(here, rel=tolerance)
    for x, y in zip(weights, others, strict=True):
        np.testing.assert_allclose(y, x, rtol=0, atol=tolerance * np.abs(x).max(initial=1))
