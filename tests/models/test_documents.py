"""A sample that holds several documents gives for each of them what it gives alone, and the sum of their gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcmp import wgrad
from hpcmp.arrays import Array
from hpcmp.cursor import Cursor, Place
from hpcmp.documents import beginnings
from hpcmp.layers.context import documents
from hpcmp.layers.parallel import ModelParallel
from hpcmp.models.architecture import Architecture
from hpcmp.models.transformer import build
from tests.kernels.emulation.backend import needs_gxx
from tests.models.test_cuda_model import on_cuda

END, LENGTHS = 10, ((1, 5, 4, 3), (7, 1, 1, 4))  # of the documents of two samples


def model(style: Any, place: Place) -> Any:
    a = Architecture(style, 2, 12, 6, 3, 4, 7, 11, 16, tied=style == "gpt", bias=style == "gpt")
    cursor = Cursor()
    cursor.place = place
    made = build(a, ModelParallel(cursor=cursor))
    made.initialise(3, np.float64)
    return made


def through(made: Any, tokens: Array, dy: Array) -> tuple[Array, dict[str, Array]]:
    """The logits, and the gradients of all parameters."""
    y, saved = made.forward(tokens)
    y = y.copy()
    made.backward(dy, saved, wgrad.now)
    return y, {p.name: p.grad for p in made.parameters()}


def assert_documents_are_computed_as_if_alone(style: str = "gpt", tolerance: float = 1e-12) -> None:
    """Logits and gradients."""
    rng, length = np.random.default_rng(0), sum(LENGTHS[0])
    tokens, dy = rng.integers(0, END, (length, 2)), rng.normal(size=(length, 2, 11))
    for i, lengths in enumerate(LENGTHS):
        tokens[np.cumsum(lengths) - 1, i] = END
    parallel = ModelParallel()
    parallel.cursor.place = Place(length=length)
    apart = documents(parallel, beginnings(tokens, END), np)
    found, gradients = through(model(style, Place(length=length, documents=apart)), tokens, dy)
    sums = {name: np.zeros_like(gradient) for name, gradient in gradients.items()}
    for i, lengths in enumerate(LENGTHS):
        for stop, n in zip(np.cumsum(lengths), lengths, strict=True):
            one = np.s_[stop - n : stop, i : i + 1]
            y, part = through(model(style, Place(length=n)), tokens[one], dy[one])
            np.testing.assert_allclose(found[one], y, rtol=0, atol=tolerance * abs(y).max())
            for name in sums:
                sums[name] += part[name]
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, sums[name], rtol=0, atol=tolerance * abs(sums[name]).max())


@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_a_document_of_a_sample_is_computed_as_if_it_were_alone(style: str) -> None:
    assert_documents_are_computed_as_if_alone(style)


@needs_gxx
@pytest.mark.timeout(300)  # g++ builds what has changed
@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_so_it_is_on_the_cuda_kernels(style: str) -> None:
    with on_cuda():
        assert_documents_are_computed_as_if_alone(style, 1e-11)
