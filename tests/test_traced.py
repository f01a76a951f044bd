"""Traced: every rule against central differences, the engine's contract, and nothing lost in silence."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

import hpcmp.traced
from hpcmp.module import Parameter, Sequential
from hpcmp.traced import RULES, Traced, rules, shapes, stop_gradient
from hpcmp.wgrad import Queue, now

rng = np.random.default_rng(0)


class Case(NamedTuple):
    """fn of operands: a shape stands for float64 numbers of that shape, an array for itself."""

    name: str
    fn: Callable[..., Any]
    operands: tuple[Any, ...]
    positive: bool = False

    def arrays(self) -> tuple[Any, ...]:
        """Operands with magnitudes in [0.5, 2), away from the kinks at 0 and, being random, from ties."""
        draw = np.random.default_rng(len(self.name))
        return tuple(number(draw, a, self.positive) if isinstance(a, tuple) else a for a in self.operands)


def number(draw: np.random.Generator, shape: tuple[int, ...], positive: bool = False) -> Any:
    x = np.asarray(draw.uniform(0.5, 2, shape))
    return x if positive else x * draw.choice([-1, 1], shape)


MASK = np.array([[True, False, True], [False, True, True]])
ROWS = np.array([2, 0, 2, 2])

CASES = [
    Case("add", lambda a, b: a + b, ((2, 3), (3,))),
    Case("add scalar", lambda a: 2 + a + 1.5, ((2, 3),)),
    Case("subtract", lambda a, b: a - b, ((2, 1), (1, 3))),
    Case("subtract from scalar", lambda a: 1 - a, ((3,),)),
    Case("multiply", lambda a, b: a * b, ((4, 1, 3), (2, 1))),
    Case("multiply by itself", lambda a: a * a * a, ((3,),)),
    Case("divide", lambda a, b: a / b, ((), (2, 3))),
    Case("divide scalar", lambda a: 2 / a, ((2, 3),)),
    Case("empty broadcast", lambda a, b: a * b, ((1, 3), (0, 3))),
    Case("power", lambda a, b: np.power(a, b), ((2, 3), (3,)), positive=True),
    Case("power operator", lambda a, b: a**b, ((2, 3), (3,)), positive=True),
    Case("power scalars", lambda a: a**3 + a**-1 + a**0 + a**1, ((2, 3),)),
    Case("power of a scalar", lambda a: 2.0**a, ((2, 3),)),
    Case("power by integers", lambda a, n: a**n, ((3,), np.array([0, 1, 3]))),
    Case("root", lambda a: a**0.5, ((2, 3),), positive=True),
    Case("unary", lambda a: -(+a), ((2, 3),)),
    Case("abs", lambda a: abs(a) + np.abs(a), ((2, 3),)),
    Case("square", lambda a: np.square(a), ((2, 3),)),
    Case("sqrt", lambda a: np.sqrt(a), ((2, 3),), positive=True),
    Case("reciprocal", lambda a: np.reciprocal(a), ((2, 3),)),
    Case("exp", lambda a: np.exp(a), ((2, 3),)),
    Case("expm1", lambda a: np.expm1(a), ((2, 3),)),
    Case("log", lambda a: np.log(a), ((2, 3),), positive=True),
    Case("log1p", lambda a: np.log1p(a), ((2, 3),), positive=True),
    Case("tanh", lambda a: np.tanh(a), ((2, 3),)),
    Case("sin", lambda a: np.sin(a), ((2, 3),)),
    Case("cos", lambda a: np.cos(a), ((2, 3),)),
    Case("maximum", lambda a, b: np.maximum(a, b), ((2, 3), (2, 1))),
    Case("minimum", lambda a, b: np.minimum(a, b), ((2, 3), (2, 1))),
    Case("relu", lambda a: np.maximum(a, 0), ((2, 3),)),
    Case("logaddexp", lambda a, b: np.logaddexp(a, b), ((2, 3), (3,))),
    Case("clip", lambda a: np.clip(a, -1, 1) + a.clip(0), ((4, 5),)),
    Case("where", lambda m, a, b: np.where(m, a, b), (MASK, (2, 3), (3,))),
    Case("where scalar", lambda m, a: np.where(m, a, -np.inf)[m] + np.where(m, 0, a)[m], (MASK, (2, 3))),
    Case("where compared", lambda a: np.where(a > 0, a, 0.1 * a), ((4, 5),)),
    Case("astype", lambda a: a.astype(np.float64) * 2, ((3,),)),
    Case("copy", lambda a: a.copy() + np.copy(a), ((3,),)),
    Case("matmul vectors", lambda a, b: a @ b, ((3,), (3,))),
    Case("matmul vector matrix", lambda a, b: a @ b, ((3,), (3, 2))),
    Case("matmul matrix vector", lambda a, b: a @ b, ((2, 3), (3,))),
    Case("matmul", lambda a, b: np.matmul(a, b), ((2, 3), (3, 4))),
    Case("matmul batch matrix", lambda a, b: a @ b, ((2, 5, 1, 3), (3, 4))),
    Case("matmul matrix batch", lambda a, b: a @ b, ((2, 3), (5, 2, 3, 4))),
    Case("matmul batch vector", lambda a, b: a @ b, ((2, 4, 3), (3,))),
    Case("matmul vector batch", lambda a, b: a @ b, ((3,), (2, 3, 4))),
    Case("matmul batches", lambda a, b: a @ b, ((2, 1, 4, 3), (5, 3, 2))),
    Case("matmul empty", lambda a, b: a @ b, ((2, 0, 3), (3, 4))),
    Case("matmul over nothing", lambda a, b: a @ b, ((2, 0), (0, 4))),
    Case("matmul no batch", lambda a, b: a @ b, ((0, 2, 3), (1, 3, 4))),
    Case("einsum", lambda a, b: np.einsum("bij,bjk->bik", a, b), ((2, 3, 4), (2, 4, 5))),
    Case("einsum implicit", lambda a, b: np.einsum("ij,jk", a, b), ((2, 3), (3, 4))),
    Case("einsum three", lambda a, b, c: np.einsum("ij,jk,k->i", a, b, c), ((2, 3), (3, 4), (4,))),
    Case("einsum optimised", lambda a, b: np.einsum("ij,jk->ki", a, b, optimize=True), ((2, 3), (3, 4))),
    Case("einsum transpose", lambda a: np.einsum("ijk->kij", a), ((2, 3, 4),)),
    Case("einsum sum", lambda a: np.einsum("ij->", a) * np.einsum("ij->j", a), ((2, 3),)),
    Case("einsum summed alone", lambda a, b: np.einsum("ijm,jk->ik", a, b), ((2, 3, 4), (3, 2))),
    Case("einsum length 1", lambda a, b: np.einsum("ij,ij->i", a, b), ((2, 1), (2, 3))),
    Case("einsum ellipsis", lambda a, b: np.einsum("...ij,jk->...ki", a, b), ((5, 2, 2, 3), (3, 4))),
    Case("einsum ellipses", lambda a, b: np.einsum("...i,j...", a, b), ((5, 1, 3), (4, 2))),
    Case("einsum scalar", lambda a, b: np.einsum(",i->i", a, b), ((), (3,))),
    Case("sum", lambda a: a.sum() + np.sum(a, -1) + a.sum((0, 2), keepdims=True), ((2, 3, 2),)),
    Case("sum empty", lambda a: a.sum(1) + a.sum(), ((2, 0),)),
    Case("mean", lambda a: a.mean() + np.mean(a, axis=-2) + a.mean((0, -1), keepdims=True), ((2, 3, 3),)),
    Case("max", lambda a: a.max() + np.max(a, axis=-2) + a.max((0, -1), keepdims=True), ((2, 3, 3),)),
    Case("min", lambda a: a.min() + np.min(a, axis=-2) + a.min((0, -1), keepdims=True), ((2, 3, 3),)),
    Case("amax", lambda a: np.amax(a, 1) * np.amin(a, 1), ((2, 3),)),
    Case("max empty", lambda a: a.max(1), ((0, 2),)),
    Case("var", lambda a: a.var() + np.var(a, axis=-1, keepdims=True) + a.var(1, ddof=1), ((3, 3),)),
    Case("std", lambda a: a.std() + np.std(a, axis=-1, keepdims=True) + a.std(1, ddof=1), ((3, 3),)),
    Case("cumsum", lambda a: np.cumsum(a, axis=-2) + a.cumsum(1), ((2, 3),)),
    Case("cumsum flattened", lambda a: a.cumsum(), ((2, 3),)),
    Case("reshape", lambda a: a.reshape(3, 2) + a.reshape((3, -1)) + np.reshape(a, (3, 2)), ((2, 3),)),
    Case("ravel", lambda a: a.ravel() + a.flatten() + a.reshape(-1), ((2, 3),)),
    Case("squeeze", lambda a: a.squeeze(1) + np.squeeze(a), ((2, 1, 3),)),
    Case("expand_dims", lambda a: np.expand_dims(a, (0, -1)), ((2, 3),)),
    Case("broadcast_to", lambda a: np.broadcast_to(a, (4, 2, 3)), ((2, 1),)),
    Case("transpose", lambda a: a.transpose(2, 0, 1) + np.transpose(a, (-1, 0, 1)), ((2, 3, 4),)),
    Case("transpose all", lambda a: a.T + a.transpose(), ((2, 3, 4),)),
    Case("swapaxes", lambda a: a.swapaxes(0, -1) + np.swapaxes(a, 2, 0), ((2, 3, 4),)),
    Case("moveaxis", lambda a: np.moveaxis(a, 0, -1) + np.moveaxis(a, (1, 2), (0, 1)), ((2, 3, 4),)),
    Case("flip", lambda a: np.flip(a, -1) * np.flip(a), ((2, 3),)),
    Case("tril", lambda a: np.tril(a) + np.tril(a, -1), ((3, 3),)),
    Case("triu", lambda a: np.triu(a) + np.triu(a, 1), ((3, 3),)),
    Case("concatenate", lambda a, b: np.concatenate([a, b, a], axis=-1), ((2, 3), (2, 0))),
    Case("concatenate 0", lambda a, b: np.concatenate((a, np.zeros_like(a), b)), ((2, 3), (1, 3))),
    Case("stack", lambda a, b: np.stack([a, b, a], axis=-1) * np.stack((a, b, b), 2), ((2, 3), (2, 3))),
    Case("index basic", lambda a: a[0] + a[1:, None, ..., 2] + a[-1, ::-1], ((2, 3, 3),)),
    Case("index scalar", lambda a: a[1, 2], ((2, 3),)),
    Case("index mask", lambda m, a: a[m], (MASK, (2, 3))),
    Case("index mask of rows", lambda m, a: a[m[0]], (MASK, (3, 2))),
    Case("index duplicates", lambda i, a: a[i] * 2, (ROWS, (3, 2))),
    Case("index pairs", lambda i, a: a[i, i - 1] + a[..., i][0], (ROWS, (3, 4))),
    Case("index list", lambda a: a[[0, 0, 1]] + a[[1, 1, 0], 0:1], ((2, 3),)),
    Case("index negative", lambda i, a: a[:, -i], (ROWS, (2, 3))),
    Case("unpacked", lambda a: sum(row * (n + 1) for n, row in enumerate(a)), ((3, 2),)),
    Case("take", lambda i, a: np.take(a, i, axis=-2) + a.take(i, 0), (ROWS, (3, 2))),
    Case("take flattened", lambda i, a: np.take(a, i) + a.take(-i), (ROWS, (2, 3))),
    Case("take_along_axis", lambda i, a: np.take_along_axis(a, i, 1), (np.array([[0, 0], [2, 2]]), (2, 3))),
    Case("take_along_axis -2", lambda i, a: np.take_along_axis(a, i, -2), (np.array([[[1], [1]]]), (2, 2, 3))),
    Case("take_along_axis flattened", lambda i, a: np.take_along_axis(a, i, None), (ROWS, (2, 3))),
]


def parameter(value: Any) -> Parameter:
    p = Parameter(value.shape)
    p.data, p.grad = value, value * 0
    return p


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
    """The same pullbacks, but for one that is one per cent too large."""
    if callable(pullbacks):
        return lambda dy: 1.01 * pullbacks(dy)
    if isinstance(pullbacks, list):
        return [scaled(pullback, 0) for pullback in pullbacks]
    return tuple(p and scaled(p, 0) if i == wrong else p for i, p in enumerate(pullbacks))


@pytest.mark.parametrize("function", RULES, ids=lambda function: function.__name__)
def test_a_wrong_rule_is_caught(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pullback of each rule has a case that fails when the pullback is wrong: the table above has no hole."""
    rule = RULES[function]
    answers = []
    monkeypatch.setitem(RULES, function, lambda *args, **kwargs: answers.append(rule(*args, **kwargs)) or answers[-1])
    uses = []
    for case in CASES:
        answers.clear()
        Traced(case.fn).forward(case.arrays())
        if answers:
            uses.append(case)
    assert uses, "no case uses this rule"
    number_of_pullbacks = 1 if callable(rule_answer := answers_of(rule, uses[0], function, monkeypatch)) else len(rule_answer)
    for wrong in range(number_of_pullbacks):
        if not callable(rule_answer) and rule_answer[wrong] is None:
            continue
        monkeypatch.setitem(RULES, function, lambda *args, wrong=wrong, **kw: scaled(rule(*args, **kw), wrong))
        with pytest.raises(AssertionError):
            for case in uses:
                check(case.fn, case.arrays())
