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
    return np.asarray(draw.uniform(0.5, 2, shape) * (1 if positive else draw.choice([-1, 1], shape)))


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


def at(pullbacks: Any, i: int) -> Any:
    """The pullback, or list of pullbacks, of operand i: None if there is none."""
    return ((pullbacks,) if callable(pullbacks) else pullbacks)[i : i + 1] or None


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
    np.testing.assert_allclose(dx, [[0, third, third, third], [5, 5, 0, 0]])
    _, (dx,) = traced_gradients(lambda x: -np.min(-x), (x,), 1.0)
    np.testing.assert_allclose(dx, [[0, third, third, third], [0, 0, 0, 0]])
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


def cross_entropy(logits: Any, targets: Any) -> Any:
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, targets[..., None], -1).mean()


def softmax(x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(x: Any, mask: Any, qkv: Any, out: Any) -> Any:
    """Causal self-attention over (sequence, batch, hidden); qkv is (hidden, 3, heads, size), out is its return."""
    q, k, v = np.einsum("sbh,hcnd->csbnd", x, qkv)
    scores = np.einsum("ibnd,jbnd->bnij", q, k) / qkv.shape[-1] ** 0.5
    return np.einsum("bnij,jbnd,ndh->ibh", softmax(np.where(mask, scores, -np.inf)), v, out)


def test_cross_entropy() -> None:
    logits, targets = rng.normal(size=(4, 3, 7)), rng.integers(0, 7, (4, 3))
    loss, saved = Traced(cross_entropy).forward((logits, targets))
    dx, none = Traced(cross_entropy).backward(2.0, saved, now)
    p = softmax(logits)
    chosen = np.eye(7)[targets]
    np.testing.assert_allclose(loss, -np.log((p * chosen).sum(-1)).mean(), rtol=1e-14)
    np.testing.assert_allclose(dx, 2 * (p - chosen) / targets.size, rtol=1e-12, atol=1e-15)
    assert none is None


def test_attention() -> None:
    s, b, h, n, d = 5, 2, 6, 2, 3
    x, mask = rng.normal(size=(s, b, h)), np.tril(np.ones((s, s), bool))
    qkv, out = parameter(rng.normal(size=(h, 3, n, d))), parameter(rng.normal(size=(n, d, h)))
    layer = Traced(lambda x, **weights: attention(x, mask, **weights), qkv=qkv, out=out)
    y, saved = layer.forward(x)
    dy = rng.normal(size=y.shape)
    dx = layer.backward(dy, saved, now)

    # The same by hand, with (batch, head) in front.
    q, k, v = (np.einsum("sbh,hnd->bnsd", x, qkv.data[:, i]) for i in range(3))
    p = softmax(np.where(mask, q @ k.swapaxes(-1, -2) / d**0.5, -np.inf))
    np.testing.assert_allclose(y, np.einsum("bnsd,ndh->sbh", p @ v, out.data), rtol=1e-12)
    dz = np.einsum("sbh,ndh->bnsd", dy, out.data)
    dp = dz @ v.swapaxes(-1, -2)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / d**0.5
    parts = ds @ k, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ dz
    np.testing.assert_allclose(out.grad, np.einsum("sbh,bnsd->ndh", dy, p @ v), rtol=1e-10)
    for i, part in enumerate(parts):
        np.testing.assert_allclose(qkv.grad[:, i], np.einsum("sbh,bnsd->hnd", x, part), rtol=1e-10, atol=1e-12)
    expected = sum(np.einsum("bnsd,hnd->sbh", part, qkv.data[:, i]) for i, part in enumerate(parts))
    np.testing.assert_allclose(dx, expected, rtol=1e-10, atol=1e-12)


def dense(x: Any, weight: Any, bias: Any) -> Any:
    return np.tanh(x @ weight + bias)


def dense_layer() -> Traced:
    return Traced(dense, weight=Parameter((3, 4)), bias=Parameter((4,)))


def test_it_is_a_module() -> None:
    model = Sequential(first=dense_layer(), second=Traced(lambda x: (x * x).sum(-1)))
    parameters = model.initialise(seed=1, dtype=np.float64)
    assert [p.name for p in parameters] == ["first/weight", "first/bias"]
    x = rng.normal(size=(5, 2, 3))
    calls: list[Any] = []

    def wgrad(fn: Any, *args: Any) -> None:
        calls.append(fn.__self__)
        fn(*args)

    for times in 1, 2:  # gradients accumulate
        y, saved = model.forward(x)
        dx = model.backward(np.ones_like(y), saved, wgrad)
        assert calls == [model.layers["first"]] * times  # and what has no parameters does not call
        h = dense(x, *(p.data for p in parameters))
        dz = 2 * h * (1 - h * h)
        np.testing.assert_allclose(dx, dz @ parameters[0].data.T, rtol=1e-12)
        np.testing.assert_allclose(parameters[0].grad, times * np.einsum("sbi,sbo->io", x, dz), rtol=1e-12)
        np.testing.assert_allclose(parameters[1].grad, times * dz.sum((0, 1)), rtol=1e-12)


def test_weight_gradients_wait_for_the_w_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """B computes dx alone: the products that lead to parameters, however many steps away, run when the queue does."""
    ran: list[str] = []

    def named(rule: Any, name: str) -> Any:
        def logged(pullback: Any, which: int) -> Any:
            return lambda dy: (ran.append(f"{name} {which}"), pullback(dy))[1]

        def spy(*args: Any) -> Any:
            pullbacks = rule(*args)
            each = (pullbacks,) if callable(pullbacks) else pullbacks
            return tuple(logged(pullback, i) for i, pullback in enumerate(each))

        return spy

    for function in np.matmul, np.exp:
        monkeypatch.setitem(RULES, function, named(RULES[function], function.__name__))
    w = parameter(rng.normal(size=(3, 2)))
    layer = Traced(lambda x, w: (np.exp(x) @ np.exp(w), (w * w).sum()), w=w)
    x = rng.normal(size=(4, 3))
    queue = Queue()
    (y, norm), saved = layer.forward(x)
    dy = rng.normal(size=y.shape)
    dx = layer.backward((dy, 0.5), saved, queue)
    assert ran == ["matmul 0", "exp 0"] and len(queue.items) == 1 and not w.grad.any()
    np.testing.assert_allclose(dx, dy @ np.exp(w.data).T * np.exp(x), rtol=1e-13)
    queue.flush()
    assert ran == ["matmul 0", "exp 0", "matmul 1", "exp 0"]
    np.testing.assert_allclose(w.grad, np.exp(x).T @ dy * np.exp(w.data) + w.data, rtol=1e-13)


def test_several_forwards_alive() -> None:
    """As in a pipeline: each microbatch has its own tape, and they are run back in any order, each once."""
    layer = dense_layer()
    weight, _ = layer.initialise(dtype=np.float64)
    xs = [rng.normal(size=(2, 3)) for _ in range(3)]

    def gradients(order: list[int]) -> tuple[list[Any], Any]:
        weight.grad[...] = 0
        saved = [layer.forward(x)[1] for x in xs]
        dx = {i: layer.backward(np.full((2, 4), i + 1.0), saved[i], now) for i in order}
        with pytest.raises(RuntimeError, match="already run"):
            layer.backward(np.ones((2, 4)), saved[0], now)
        return [dx[i] for i in range(3)], weight.grad.copy()

    expected, w_expected = gradients([0, 1, 2])
    got, w_got = gradients([2, 0, 1])
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(w_got, w_expected, rtol=1e-14)


def test_memory() -> None:
    """Forward keeps what the rules name and nothing else; backward frees even that."""
    alive: dict[str, weakref.ref[Any]] = {}

    def watch(name: str, x: Any) -> Any:
        alive[name] = weakref.ref(stop_gradient(x))
        return x

    def fn(x: Any) -> Any:
        plus = watch("plus", x + 1)  # a sum needs neither operand, exp only its result
        root = watch("exp", np.exp(plus))
        halved = watch("halved", root * 0.5)  # a product by a constant keeps the constant
        return watch("reshaped", halved.reshape(-1).copy()).sum()

    layer = Traced(fn)
    _, saved = layer.forward(np.ones((2, 3)))
    assert {name for name, ref in alive.items() if ref() is not None} == {"exp"}
    layer.backward(1.0, saved, now)
    assert alive["exp"]() is None


def test_inputs_and_outputs() -> None:
    x, i = rng.normal(size=(2, 3)), np.array([1, 0])
    # One array in, one array out; a tuple in, a tuple out; None where there is no gradient.
    y, saved = Traced(lambda x: x).forward(x)
    assert y is x
    np.testing.assert_array_equal(Traced(np.exp).backward(x, saved, now), x)
    y, saved = Traced(lambda i: i * 2).forward(i)
    assert Traced(np.exp).backward(np.ones(2), saved, now) is None
    layer = Traced(lambda x, i, z: (x[i], x.argmax(-1), x.sum()))
    y, saved = layer.forward((x, i, x))
    np.testing.assert_array_equal(y[1], x.argmax(-1))
    dx = layer.backward((np.ones((2, 3)), None, None), saved, now)
    assert (dx[0] == 1).all() and dx[1] is None and (dx[2] == 0).all() and dx[2].shape == x.shape
    y, saved = layer.forward((x, i, x))
    assert (layer.backward((None, None, 3.0), saved, now)[0] == 3).all()
    # A dy of another shape is an error, not a broadcast.
    with pytest.raises(ValueError, match=r"dy of shape \(3,\) for y of shape \(2, 3\)"):
        layer.backward((np.ones(3), None, None), layer.forward((x, i, x))[1], now)
    for result in None, [x]:
        with pytest.raises(TypeError, match="must return an array or a tuple"):
            Traced(lambda x, result=result: result).forward(x)
    with pytest.raises(TypeError, match="must be an array or a tuple of arrays, not list"):
        Traced(np.exp).forward([1.0])
    with pytest.raises(ValueError, match="weight has no value yet"):
        dense_layer().forward(x)


def test_what_a_tracer_looks_like() -> None:
    def fn(x: Any) -> Any:
        assert (x.shape, x.ndim, x.size, x.dtype, len(x)) == ((2, 3), 2, 6, np.float64, 2)
        assert np.shape(x) == (2, 3) and x.T.shape == (3, 2) and "Tracer(array(" in repr(x)
        for plain in (x > 0, x == x, 1 <= x, np.isnan(x), x.argmax(), x.any(), np.zeros_like(x), x.astype(int)):
            assert isinstance(plain, np.ndarray | np.generic)
        assert isinstance(np.float64(2) * x, hpcmp.traced.Tracer) and isinstance(np.ones(3) @ x.T, hpcmp.traced.Tracer)
        return x * stop_gradient(x) + stop_gradient(1)

    x = rng.normal(size=(2, 3))
    layer = Traced(fn)
    np.testing.assert_array_equal(layer.backward(np.ones((2, 3)), layer.forward(x)[1], now), x)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes(dtype: Any) -> None:
    """Scalars do not widen; each gradient has its own array's dtype, whatever lies between."""

    def fn(x: Any, wide: Any, w: Any) -> Any:
        y = np.where(x > 0, 2 * x + 1, 0.5) ** 2 / 3
        assert y.dtype == dtype
        z = (y.mean(-1, keepdims=True) + np.maximum(w, 0)).astype(np.float64) * wide
        assert z.dtype == np.float64
        return z.astype(np.float32)

    w = parameter(rng.normal(size=(2, 3)).astype(dtype))
    x, wide = rng.normal(size=(2, 3)).astype(dtype), rng.normal(size=3)
    layer = Traced(fn, w=w)
    y, saved = layer.forward((x, wide))
    dx, dwide = layer.backward(np.ones_like(y), saved, now)
    assert (y.dtype, dx.dtype, dwide.dtype, w.grad.dtype) == (np.float32, dtype, np.float64, dtype)
    _, saved = (loss := Traced(lambda x: x.sum())).forward(np.ones(3, dtype))
    assert loss.backward(1.0, saved, now).dtype == dtype
    with pytest.raises(TypeError, match="complex128 are not traced"):
        Traced(np.exp).forward(np.ones(2, complex))


def test_weight_gradient_is_summed_in_its_own_dtype() -> None:
    """Half-precision weights with a float32 gradient: what a shared weight gathers is added up in float32."""
    w = parameter(np.ones(1, np.float16))
    w.grad = np.zeros(1, np.float32)
    layer = Traced(lambda x, w: x * w, w=w)
    x = np.ones(5000, np.float16)  # float16 cannot count beyond 2048
    layer.backward(x, layer.forward(x)[1], now)
    assert w.grad == 5000


kept: list[Any] = []
plain = np.ones((2, 2))
REFUSED: list[tuple[str, Callable[[Any], Any], str]] = [
    ("unknown function", lambda x: np.linalg.inv(x), "inv is not traced .* write a Module"),
    ("unknown ufunc", lambda x: np.arctan2(x, 1.0), "arctan2 is not traced .* write a Module"),
    ("unknown method", lambda x: x.prod(), "prod is not traced"),
    ("sort", lambda x: x.sort(), "sort is not traced"),
    ("ufunc method", lambda x: np.add.reduce(x), "add.reduce is not traced"),
    ("remainder", lambda x: x % 2, "remainder is not traced"),
    ("unknown keyword", lambda x: np.sum(x, where=plain > 0), "sum with these arguments is not traced .*where"),
    ("ufunc keyword", lambda x: np.exp(x, where=plain > 0), "exp with these arguments is not traced"),
    ("tracer keyword", lambda x: np.clip(x, a_min=x, a_max=None), "clip: pass traced arrays by position"),
    ("clip to a tracer", lambda x: np.clip(1.0, x, None), "clip with respect to one"),
    ("condition", lambda x: np.where(x, plain, x), "where with respect to one"),
    ("concatenate one", lambda x: np.concatenate(x), "concatenate with respect to one"),
    ("concatenate flat", lambda x: np.concatenate([x, x], axis=None), "concatenate .*axis=None"),
    ("repeated index", lambda x: np.einsum("ii->i", x), "einsum .*repeats an index"),
    ("einsum lists", lambda x: np.einsum(x, [0, 1], [1, 0]), "einsum .*must be a string"),
    ("integer sum", lambda x: x.sum(dtype=int), "sum gave int64"),
    ("complex", lambda x: x.astype(complex), "complex128 are not traced"),
    ("asarray", lambda x: np.asarray(x), "cannot become a plain array"),
    ("array of", lambda x: np.array([x[0, 0], x[0, 1]]), "cannot become a plain array"),
    ("sum of a list", lambda x: np.sum([x, x]), "cannot become a plain array"),
    ("method of an array", lambda x: plain.dot(x), "cannot become a plain array"),
    ("random", lambda x: np.random.default_rng(0).normal(x), "cannot become a plain array"),
    ("full", lambda x: np.full((2, 2), x), "cannot become a plain array"),
    ("full_like", lambda x: np.full_like(plain, x), "copyto is not traced"),
    ("vectorize", lambda x: np.vectorize(lambda v: v)(x), "cannot become a plain array"),
    ("index", lambda x: plain[x], "cannot become a plain array"),
    ("float", lambda x: float(x[0, 0]), "cannot become a plain array"),
    ("int", lambda x: int(x[0, 0]), "cannot become a plain array"),
    ("bool", lambda x: x if x[0, 0] else -x, "cannot become a plain array"),
    ("item", lambda x: x.item(), "ndarray.item is not traced"),
    ("tolist", lambda x: x.tolist(), "ndarray.tolist is not traced"),
    ("out", lambda x: np.exp(x, out=plain.copy()), "in place"),
    ("sum out", lambda x: np.sum(x, out=plain.copy()), "in place"),
    ("into an array", lambda x: operator.iadd(plain.copy(), x), "in place"),
    ("copyto", lambda x: np.copyto(plain.copy(), x), "copyto is not traced"),
    ("add.at", lambda x: np.add.at(plain.copy(), 0, x), "add.at is not traced"),
    ("set item", lambda x: operator.setitem(x, 0, 1.0), "in place"),
    ("from another call", lambda x: x + kept[0], "kept from another call"),
    ("from another call, returned", lambda x: kept[0], "kept from another call"),
    *((f"in-place {f.__name__}", lambda x, f=f: f(x, 1.0), "in place") for f in (
        operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.imatmul
    )),
]  # fmt: skip


@pytest.mark.parametrize(("fn", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_nothing_is_lost_in_silence(fn: Callable[[Any], Any], message: str) -> None:
    kept.clear()
    x = np.array([[1.0, 2.0], [3.0, 4.0]])
    Traced(lambda x: kept.append(x) or x).forward(x)
    with pytest.raises(TypeError, match=message):
        Traced(fn).forward(x)
