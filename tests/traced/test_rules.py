"""Every rule against central differences, in float64; and every rule, made wrong, is caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hpcmp.traced import RULES, Traced
from hpcmp.wgrad import now
from tests.traced.cases import CASES, Case, number, parameter


def traced_gradients(fn: Callable[..., Any], arrays: tuple[Any, ...], dy: Any) -> tuple[Any, list[Any]]:
    """y and the gradient of each array: with all as inputs, and again with the floats as parameters (in the W slot)."""
    layer = Traced(fn)
    y, saved = layer.forward(arrays)
    dx = layer.backward(dy, saved, now)

    fixed = [a for a in arrays if a.dtype.kind != "f"]  # in every case the operands without a gradient come first
    floats = {f"w{i}": parameter(a) for i, a in enumerate(arrays) if a.dtype.kind == "f"}
    of_weights = Traced(lambda *x, **w: fn(*x[1:], *w.values()), **floats)
    same_y, saved = of_weights.forward((np.zeros(1), *fixed))
    assert np.array_equal(same_y, y)
    of_weights.backward(dy, saved, now)
    weight_gradients = iter([p.grad for p in floats.values()])
    for d in dx:
        np.testing.assert_allclose(next(weight_gradients) if d is not None else 0, 0 if d is None else d, rtol=1e-14)
    return y, list(dx)


def check(fn: Callable[..., Any], arrays: tuple[Any, ...], step: float = 1e-6) -> None:
    """The traced value is fn's own, and d <dy, fn(x)> / dx by the tape is that by central differences."""
    expected = fn(*arrays)
    dy = np.random.default_rng(1).normal(size=np.shape(expected))
    y, dx = traced_gradients(fn, arrays, dy)
    assert type(y) is type(expected) and np.array_equal(y, expected)
    for i, (x, d) in enumerate(zip(arrays, dx, strict=True)):
        if x.dtype.kind != "f":
            assert d is None
            continue
        assert d.shape == x.shape and d.dtype == x.dtype and d.flags.c_contiguous and isinstance(d, np.ndarray)
        numeric = np.zeros_like(x)
        for at in np.ndindex(x.shape):
            ends = []
            for sign in (1, -1):
                moved = x.copy()
                moved[at] += sign * step
                ends.append(np.sum(dy * fn(*arrays[:i], moved, *arrays[i + 1 :])))
            numeric[at] = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(d, numeric, rtol=1e-6, atol=1e-7)


by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@by_case
def test_rule(case: Case) -> None:
    check(case.fn, case.arrays())


@pytest.mark.parametrize("seed", range(20))
def test_random_broadcasting(seed: int) -> None:
    draw = np.random.default_rng(seed)
    shape = tuple(int(n) for n in draw.integers(0, 4, draw.integers(0, 5)))
    a, b, c = (
        number(draw, tuple(int(draw.choice([1, n])) for n in shape[draw.integers(0, len(shape) + 1) :]))
        for _ in range(3)
    )
    check(lambda a, b, c: np.where(a > b, a * b - c, np.maximum(b, c) / a), (a, b, c))


@pytest.mark.parametrize("seed", range(20))
def test_random_products(seed: int) -> None:
    draw = np.random.default_rng(seed)
    n, k, m = (int(size) for size in draw.integers(0, 4, 3))
    batch = tuple(int(size) for size in draw.integers(1, 3, draw.integers(0, 3)))
    first, second = (
        tuple(int(draw.choice([1, size])) for size in batch[draw.integers(0, len(batch) + 1) :]) for _ in "ab"
    )
    arrays = number(draw, (*first, n, k)), number(draw, (*second, k, m))
    check(lambda a, b: a @ b, arrays)
    check(lambda a, b: np.einsum("...nk,...km->...mn", a, b), arrays)


def scaled(pullbacks: Any, wrong: int) -> Any:
    """The same pullbacks, but for operand ``wrong``, whose gradient is one per cent too large."""
    if callable(pullbacks):
        return lambda dy: 1.01 * pullbacks(dy)
    if isinstance(pullbacks, list):
        return [scaled(pullback, 0) for pullback in pullbacks]
    return tuple(p and scaled(p, 0) if i == wrong else p for i, p in enumerate(pullbacks))


@pytest.mark.parametrize("function", RULES, ids=lambda function: function.__name__)
def test_a_wrong_rule_is_caught(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each pullback of each rule there is a case that fails when it is wrong: the table has no hole."""
    rule = RULES[function]
    operands_of: dict[str, set[int]] = {}
    for case in CASES:
        found = operands_of[case.name] = set()

        def spy(*args: Any, found: set[int] = found, **kwargs: Any) -> Any:
            pullbacks = rule(*args, **kwargs)
            each = (pullbacks,) if callable(pullbacks) else pullbacks
            found.update(i for i, pullback in enumerate(each) if pullback is not None)
            return pullbacks

        monkeypatch.setitem(RULES, function, spy)
        Traced(case.fn).forward(case.arrays())

    operands = set.union(*operands_of.values())
    assert operands, "no case uses this rule"
    for wrong in operands:
        monkeypatch.setitem(RULES, function, lambda *args, i=wrong, **kwargs: scaled(rule(*args, **kwargs), i))
        with pytest.raises(AssertionError):
            for case in CASES:
                if wrong in operands_of[case.name]:
                    check(case.fn, case.arrays())


def test_ties_share_equally() -> None:
    x = np.array([[1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 0.0, 1.0]])
    third = 1 / 3
    _, (dx,) = traced_gradients(lambda x: x.max(1), (x,), np.array([1.0, 10.0]))
    np.testing.assert_allclose(dx, np.array([[0, third, third, third], [5, 5, 0, 0]]))
    _, (dx,) = traced_gradients(lambda x: -np.min(-x), (x,), 1.0)
    np.testing.assert_allclose(dx, np.array([[0, third, third, third], [0, 0, 0, 0]]))
    for function in np.maximum, np.minimum:
        _, (da, db) = traced_gradients(function, (x, x.copy()), np.ones_like(x))
        assert (da == 0.5).all() and (db == 0.5).all()


def test_edges_of_domains() -> None:
    """Where a formula gives 0 * inf the derivative is still right; at the bounds of clip it passes."""
    zero = np.zeros(2)
    _, (dx,) = traced_gradients(lambda x: x**0 + x**1 + x**2, (zero,), np.ones(2))
    assert (dx == 1).all()
    _, (dx,) = traced_gradients(lambda x: np.power(x, np.array([0, 1])), (zero,), np.ones(2))
    assert dx.tolist() == [0, 1]
    _, (_, db) = traced_gradients(lambda a, b: a**b, (zero, np.array([1.0, 2.0])), np.ones(2))
    assert (db == 0).all()
    _, (dx,) = traced_gradients(lambda x: x.clip(0, 1), (np.array([-1.0, 0.0, 1.0, 2.0]),), np.ones(4))
    assert dx.tolist() == [0, 1, 1, 0]
    _, (dx,) = traced_gradients(lambda x: np.where(x > 0, x, 1) ** 0.5, (zero,), np.ones(2))
    assert (dx == 0).all()
