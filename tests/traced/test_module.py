"""Traced behind the engine's contract: names, slots, microbatches, memory, inputs and outputs, dtypes."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest

from hpcmp.module import Parameter, Sequential
from hpcmp.traced import RULES, Traced, stop_gradient
from hpcmp.traced.tracer import Tracer
from hpcmp.wgrad import Queue, now
from tests.traced.cases import parameter

rng = np.random.default_rng(0)


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
            def run(dy: Any) -> Any:
                ran.append(f"{name} {which}")
                return pullback(dy)

            return run

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
    with pytest.raises(TypeError, match="x must be an array or a tuple of arrays, not list"):
        Traced(np.exp).forward([1.0])
    with pytest.raises(ValueError, match="weight has no value yet"):
        dense_layer().forward(x)


def test_what_a_tracer_looks_like() -> None:
    def fn(x: Any) -> Any:
        assert (x.shape, x.ndim, x.size, x.dtype, len(x)) == ((2, 3), 2, 6, np.float64, 2)
        assert np.shape(x) == (2, 3) and x.T.shape == (3, 2) and "Tracer(array(" in repr(x)
        for plain in (x > 0, x == x, 1 <= x, np.isnan(x), x.argmax(), x.any(), np.zeros_like(x), x.astype(int)):
            assert isinstance(plain, np.ndarray | np.generic)
        assert isinstance(np.float64(2) * x, Tracer) and isinstance(np.ones(3) @ x.T, Tracer)
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
    layer = Traced(lambda x, w: x * w + w[np.zeros(5001, int)], w=w)
    x = np.ones(5001, np.float16)  # float16 has no odd numbers beyond 2048
    layer.backward(x, layer.forward(x)[1], now)
    assert w.grad == 10002
