"""Mixture of experts on one rank: its definition written as loops, its gradients, and those of its losses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hpcmp import wgrad
from hpcmp.arrays import Array
from hpcmp.comm.base import Solo
from hpcmp.kernels import REFERENCE as kernels
from hpcmp.layers.moe import MixtureOfExperts
from hpcmp.layers.moe.dispatch import Dispatch
from hpcmp.layers.parallel import ModelParallel
from hpcmp.module import normal
from hpcmp.testing import prepare

from .common import Case, draw, place

STD = normal(0.4)
LENGTH, HIDDEN, FFN, EXPERTS = 7, 6, 5, 5


def moe(parallel: ModelParallel, experts: int = EXPERTS, per_token: int = 2, **settings: Any) -> MixtureOfExperts:
    return MixtureOfExperts(parallel, HIDDEN, FFN, experts, per_token, initial=STD, leaving=STD, **settings)


CASES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {"router": "sigmoid", "gated": True},
    "one a token": {"per_token": 1, "bias": True},
    "one a token, sigmoid": {"per_token": 1, "router": "sigmoid"},
    "all of them": {"per_token": EXPERTS, "gated": True},
    "shared": {"shared": 2, "bias": True},
    "capacity": {"capacity": 0.8, "bias": True, "gated": True},
    "everything": {"capacity": 1.0, "shared": 1, "bias": True, "gated": True, "router": "sigmoid", "per_token": 3},
}


def case(name: str) -> Case:
    return Case(lambda p: moe(p, **CASES[name]), (HIDDEN,))


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    case(name).check_dtype()
    case(name).check_weight_gradients()
    case(name).check_serial(LENGTH)


@pytest.mark.parametrize("name", CASES)
def test_is_its_definition(name: str) -> None:
    """Token by token, expert by expert, in loops."""
    settings, parallel = CASES[name], place(LENGTH)
    layer = moe(parallel, **settings)
    weights = {p.name: p.data for p in prepare(layer, 5)}
    x = draw(LENGTH, 2, HIDDEN)
    y, _ = layer.forward(x)
    k, room = settings.get("per_token", 2), math.inf
    if "capacity" in settings:
        room = math.ceil(settings["capacity"] * LENGTH * k / EXPERTS)
    expected = np.zeros_like(x)
    for b in range(2):
        taken = [0] * EXPERTS
        for t in range(LENGTH):
            logits = x[t, b] @ weights["router/weight"]
            scores = np.exp(logits) / np.exp(logits).sum()
            if settings.get("router") == "sigmoid":
                scores = 1 / (1 + np.exp(-logits))
            chosen = sorted(range(EXPERTS), key=lambda e: -logits[e])[:k]
            for e in chosen:
                taken[e] += 1
                if taken[e] <= room:
                    gate = scores[e] / (sum(scores[chosen]) if k > 1 else 1)
                    expected[t, b] += gate * mlp(x[t, b], weights, "experts", e)
            if "shared" in settings:
                expected[t, b] += mlp(x[t, b], weights, "shared", 0)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


def mlp(x: Array, weights: dict[str, Array], name: str, e: int) -> Array:
    up, down = weights[f"{name}/up"][e], weights[f"{name}/down"][e]
    inner = np.tensordot(x, up, 1) + weights.get(f"{name}/up_bias", np.zeros(1 + e))[e]
    y = (kernels.swiglu(inner) if inner.ndim == 2 else kernels.gelu(inner)) @ down
    return y + weights.get(f"{name}/down_bias", np.zeros(1 + e))[e]


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("per_token", [1, 3])
def test_losses_and_their_gradients(router: str, per_token: int) -> None:
    """The gradient that backward adds for dy = 0 is that of the losses' definition: means over samples, times weights.

    Of a batch of 2, a token weighs 1 / (2 length); choices do not change within a step of the differences.
    """
    weight = 1 / (2 * LENGTH)
    parallel = place(LENGTH, weight=weight)
    layer = moe(parallel, per_token=per_token, router=router, balance_loss=0.3, z_loss=0.7)
    p = next(p for p in prepare(layer, 3) if p.name == "router/weight")
    x = draw(LENGTH, 2, HIDDEN)

    def minimised() -> float:
        logits = x @ p.data
        scores = np.exp(logits)
        if router == "sigmoid":
            scores = 1 / (1 + np.exp(-logits))
        mean = (scores / scores.sum(-1, keepdims=True)).mean(0)
        chosen = np.argsort(-logits, -1)[..., :per_token]
        fraction = (chosen[..., None] == np.arange(EXPERTS)).mean((0, 2))
        balance = EXPERTS * (fraction * mean).sum(-1).mean()
        z = (np.log(np.exp(logits).sum(-1)) ** 2).mean()
        found.update(balance=balance, z=z)
        return float(0.3 * balance + 0.7 * z)

    found: dict[str, float] = {}
    for array, gradient in ((x, None), (p.data, p.grad)):
        numeric = np.zeros(array.shape)
        for i in np.ndindex(array.shape):
            kept = array[i]
            ends = []
            for array[i] in (kept + 1e-5, kept - 1e-5):
                ends.append(minimised())
            array[i] = kept
            numeric[i] = (ends[0] - ends[1]) / 2e-5
        if gradient is None:
            parallel.cursor.losses.clear()
            y, saved = layer.forward(x)
            assert not parallel.cursor.losses  # once a microbatch, in the backward
            gradient = layer.backward(np.zeros_like(y), saved, wgrad.now)
        np.testing.assert_allclose(gradient, numeric, rtol=1e-7, atol=1e-9)
    minimised()
    losses = parallel.cursor.losses
    assert losses["balance"] * weight == pytest.approx(found["balance"], rel=1e-12)
    assert losses["z"] * weight == pytest.approx(found["z"], rel=1e-12)
    assert losses["choices"] == 2 * LENGTH * per_token and losses["dropped"] == 0


def test_balance_is_one_at_an_even_load_and_the_number_of_experts_at_the_worst() -> None:
    parallel = place(EXPERTS)
    layer = moe(parallel, per_token=1)
    weight = next(p for p in prepare(layer) if p.name == "router/weight").data
    weight[...] = 0
    weight[:EXPERTS] = 200 * np.eye(EXPERTS)
    for rows, balance in ((np.arange(EXPERTS), 1), (np.zeros(EXPERTS, int), EXPERTS)):
        parallel.cursor.losses.clear()
        x = np.eye(HIDDEN)[rows][:, None].repeat(2, 1)
        y, saved = layer.forward(x)
        layer.backward(y, saved, wgrad.now)
        assert parallel.cursor.losses["balance"] / (2 * EXPERTS) == pytest.approx(balance)


def test_a_dropped_token_depends_on_no_later_one() -> None:
    layer = moe(place(LENGTH), capacity=0.6)
    prepare(layer, 5)
    x = draw(LENGTH, 2, HIDDEN)
    whole, _ = layer.forward(x)
    (_, sent), _ = layer.router.forward(x)
    assert 0 < (sent == EXPERTS).sum() < sent.size
    x[-1] = draw(2, HIDDEN)
    np.testing.assert_array_equal(layer.forward(x)[0][:-1], whole[:-1])


def test_capacity_of_all_drops_nothing() -> None:
    x = draw(LENGTH, 2, HIDDEN)
    ys = []
    for capacity in (None, EXPERTS):
        layer = moe(place(LENGTH), capacity=capacity)
        prepare(layer, 5)
        ys.append(layer.forward(x)[0])
    np.testing.assert_array_equal(*ys)


@pytest.mark.parametrize("name", ["softmax", "everything"])
def test_a_microbatch_of_no_samples(name: str) -> None:
    parallel = place(LENGTH)
    parallel.cursor.place = replace(parallel.cursor.place, samples=np.zeros(0, int))
    layer = moe(parallel, **CASES[name])
    parameters = prepare(layer)
    y, saved = layer.forward(np.zeros((LENGTH, 0, HIDDEN)))
    assert layer.backward(y, saved, wgrad.now).shape == y.shape == (LENGTH, 0, HIDDEN)
    assert not any(p.grad.any() for p in parameters)


def test_the_same_bits_in_every_run() -> None:
    results = []
    for _ in range(2):
        layer = moe(place(LENGTH), **CASES["everything"])
        parameters = prepare(layer, 5)
        y, saved = layer.forward(draw(LENGTH, 2, HIDDEN))
        results.append([y, layer.backward(y, saved, wgrad.now), *(p.grad for p in parameters)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_ties_go_to_the_lower_expert_and_places_come_in_order() -> None:
    x = np.array([[1.0, 3, 3, 2, 3], [0, 0, 0, 0, 0], [-np.inf, 5, 4, -np.inf, 6]])
    assert kernels.top_k(x, 3).tolist() == [[1, 2, 4], [0, 1, 2], [4, 1, 2]]


def test_rows_leave_by_expert_then_token_and_dropped_ones_stay() -> None:
    chosen = np.array([[2, 0], [0, 3], [2, 1]])  # of 3 experts: the 3 is dropped
    dispatch = Dispatch(Solo(), chosen, 3)
    assert dispatch.order.tolist() == [1, 2, 5, 0, 4] and dispatch.token.tolist() == [0, 1, 2, 0, 2]
    assert dispatch.rows == [2, 1, 2]
    x = draw(5, 4)
    back = dispatch.start_back(dispatch.start(x).wait()).wait()
    assert back.shape == (3, 2, 4) and not back[1, 1].any()
    np.testing.assert_array_equal(back.reshape(6, 4)[dispatch.order], x)


def test_the_router_works_in_single_precision_at_least() -> None:
    """Logits of 16-bit numbers are those of the same numbers in single precision."""
    layer = moe(place(LENGTH), experts=64)
    layer.initialise(0, np.float16)
    x = draw(LENGTH, 2, HIDDEN).astype(np.float16)
    (gates, chosen), _ = layer.router.forward(x)
    weight = layer.router.weight
    weight.data = weight.data.astype(np.float32)
    (again, same), _ = layer.router.forward(x.astype(np.float32))
    assert gates.dtype == np.float32
    np.testing.assert_array_equal(gates, again)
    np.testing.assert_array_equal(chosen, same)
