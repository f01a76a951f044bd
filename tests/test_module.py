"""The engine: chain rule, sum rule, recomputation, names and values of parameters, when weight gradients come."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hpcmp import random, wgrad
from hpcmp.arrays import Array
from hpcmp.module import Module, Parameter, Recompute, Residual, Sequential, constant, normal
from hpcmp.testing import gradcheck
from hpcmp.wgrad import Now, Queue, WGrad


class Affine(Module):
    """y = x W + b, whose backward asks ``wgrad`` once for both."""

    def __init__(self, i: int, o: int) -> None:
        self.weight = Parameter((i, o), initial=normal(0.5))
        self.bias = Parameter((o,), initial=constant(0.1))

    def forward(self, x: Array) -> tuple[Array, Array]:
        return x @ self.weight.data + self.bias.data, x

    def backward(self, dy: Array, saved: Array, wgrad: WGrad) -> Array:
        wgrad(self.backward_weight, saved, dy)
        return dy @ self.weight.data.T

    def backward_weight(self, x: Array, dy: Array) -> None:
        self.weight.grad += x.T @ dy
        self.bias.grad += dy.sum(0)


class Square(Module):
    """y = x^2, counting its forwards."""

    def __init__(self) -> None:
        self.forwards = 0

    def forward(self, x: Array) -> tuple[Array, Array]:
        self.forwards += 1
        return x * x, x

    def backward(self, dy: Array, saved: Array, wgrad: WGrad) -> Array:
        return 2 * saved * dy


def draw(*shape: int) -> Array:
    return np.random.default_rng(shape).normal(size=shape)


def gradients(module: Module, x: Array, way: WGrad = wgrad.now) -> tuple[Array, dict[str, Array]]:
    """dx and every parameter's gradient, for dy = 1."""
    parameters = module.initialise(3, np.float64)
    y, saved = module.forward(x)
    dx = module.backward(np.ones_like(y), saved, way)
    return dx, {p.name: p.grad.copy() for p in parameters}


CHAINS: list[Callable[[], Module]] = [
    lambda: Affine(3, 4),
    lambda: Sequential(Affine(3, 4), Square(), Affine(4, 2)),
    lambda: Residual(Affine(3, 5), Square(), Affine(5, 3)),
    lambda: Sequential(Residual(Affine(3, 3), Residual(Square())), Square()),
    lambda: Recompute(Sequential(Affine(3, 4), Square())),
    lambda: Residual(),
    lambda: Sequential(),
]


@pytest.mark.parametrize("build", CHAINS)
def test_gradients_of_compositions(build: Callable[[], Module]) -> None:
    gradcheck(build(), draw(5, 3))


@pytest.mark.parametrize("build", CHAINS)
def test_forward_is_the_composition(build: Callable[[], Module]) -> None:
    x = draw(5, 3)

    def apply(module: Module, x: Array) -> Array:
        if isinstance(module, Recompute):
            return apply(module.inner, x)
        if not isinstance(module, Sequential):
            return module.forward(x)[0]
        y = x
        for layer in module.layers.values():
            y = apply(layer, y)
        return x + y if isinstance(module, Residual) else y

    module = build()
    module.initialise(0, np.float64)
    np.testing.assert_array_equal(module.forward(x)[0], apply(module, x))


def test_recompute_gives_the_same_gradients_and_keeps_only_its_input() -> None:
    x = draw(5, 3)
    plain, again = (Sequential(Affine(3, 4), Square(), Affine(4, 2)) for _ in range(2))
    for a, b in zip(gradients(plain, x), gradients(Recompute(again), x), strict=True):
        np.testing.assert_equal(a, b)
    assert Recompute(again).forward(x)[1] is x
    square = Square()
    recompute = Recompute(square)
    y, saved = recompute.forward(x)
    assert square.forwards == 1
    recompute.backward(y, saved, wgrad.now)
    assert square.forwards == 2


def test_backward_frees_each_activation_as_it_goes() -> None:
    seen: list[bool] = []

    class Watch(Module):
        def __init__(self) -> None:
            self.later: weakref.ref[Any] | None = None

        def forward(self, x: Array) -> tuple[Array, None]:
            return x, None

        def backward(self, dy: Array, saved: None, wgrad: WGrad) -> Array:
            assert self.later is not None
            gc.collect()
            seen.append(self.later() is None)
            return dy

    class Keep(Module):
        def forward(self, x: Array) -> tuple[Array, Array]:
            kept = x + 1
            watch.later = weakref.ref(kept)
            return x, kept

        def backward(self, dy: Array, saved: Array, wgrad: WGrad) -> Array:
            return dy * saved.size

    watch = Watch()
    chain = Sequential(watch, Keep())
    y, saved = chain.forward(draw(2, 3))
    chain.backward(y, saved, wgrad.now)
    assert seen == [True]


class Told:
    """A sink that notes what it is told."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def begin(self, module: Any) -> None:
        self.events.append(("begin", module))

    def done(self, module: Any, final: bool) -> None:
        self.events.append(("done", module, final))


def test_a_queue_gives_the_same_gradients_later() -> None:
    x = draw(5, 3)
    module = Sequential(Affine(3, 4), Square(), Affine(4, 2))
    dx, now = gradients(module, x)
    queue = Queue()
    dx_queued, before = gradients(module, x, queue)
    np.testing.assert_array_equal(dx_queued, dx)
    assert all(not grad.any() for grad in before.values())
    sink = Told()
    queue.flush(Now(sink, final=True))
    for p in module.parameters():
        np.testing.assert_array_equal(p.grad, now[p.name])
    assert [event[1] for event in sink.events[::2]] == [module.layers["2"], module.layers["0"]]  # as in the backward
    queue.flush()
    np.testing.assert_array_equal(module.parameters()[0].grad, now["0/weight"])  # nothing is left to add


def test_a_queue_frees_what_it_has_computed() -> None:
    queue, alive = Queue(), []
    arrays = [np.zeros(3) for _ in range(3)]
    references = [weakref.ref(x) for x in arrays]
    for x in arrays:
        queue(lambda x: alive.append(sum(reference() is not None for reference in references)), x)
    del x
    arrays.clear()
    queue.flush()
    assert alive == [3, 2, 1]


@pytest.mark.parametrize("final", [False, True])
def test_now_tells_the_sink_before_and_after_each_module(final: bool) -> None:
    sink = Told()
    module = Sequential(Affine(3, 4), Square(), Affine(4, 2))
    _, found = gradients(module, draw(5, 3), Now(sink, final))
    last, first = module.layers["2"], module.layers["0"]
    assert sink.events == [("begin", last), ("done", last, final), ("begin", first), ("done", first, final)]
    np.testing.assert_equal(found, gradients(module, draw(5, 3))[1])


def test_names_follow_the_tree() -> None:
    module = Sequential(Affine(2, 2), body=Residual(up=Affine(2, 2), again=Recompute(Sequential(Affine(2, 2)))))
    assert [p.name for p in module.parameters()] == [
        "0/weight",
        "0/bias",
        "body/up/weight",
        "body/up/bias",
        "body/again/0/weight",
        "body/again/0/bias",
    ]


def test_members_of_lists_and_dictionaries() -> None:
    class Holder(Module):
        def __init__(self) -> None:
            self.experts = [Parameter((1,)), Parameter((2,))]
            self.table = {"query": Parameter((3,)), "other": "not a module"}
            self.number = 3

    assert [(p.name, p.shape) for p in Holder().parameters()] == [("0", (1,)), ("1", (2,)), ("query", (3,))]


def test_a_parameter_used_twice_is_one_parameter() -> None:
    first, second = Affine(3, 3), Affine(3, 3)
    second.weight = first.weight
    module = Sequential(first, second)
    names = [p.name for p in module.parameters()]
    assert names == ["0/weight", "0/bias", "1/bias"]
    assert [p.uses for p in module.parameters()] == [2, 1, 1]
    assert [(name, holder) for name, holder, p in module.walk() if p is first.weight] == [
        ("0/weight", first),
        ("1/weight", second),
    ]
    gradcheck(module, draw(4, 3))


def test_a_given_name_stays() -> None:
    class Holder(Module):
        def __init__(self) -> None:
            self.weight = Parameter((2,), name="embedding/table")

    assert [p.name for p in Sequential(Holder()).parameters()] == ["embedding/table"]


def test_where_a_shard_lies() -> None:
    whole = Parameter((4, 6))
    assert (whole.index, whole.owned, whole.local_shape) == (
        (slice(0, 4), slice(0, 6)),
        (slice(0, 4), slice(0, 6)),
        (4, 6),
    )
    shard = Parameter((4, 6), (slice(1, 3), slice(2, 6)), owned=(slice(2, 3), slice(2, 6)))
    assert shard.local_shape == (2, 4)
    assert shard.owned_local == (slice(1, 2), slice(0, 4))
    assert "local=(2, 4)" in repr(shard)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_initial_values_are_the_slice_of_the_whole(dtype: Any) -> None:
    index = (slice(1, 3), slice(2, 6))

    class Holder(Module):
        def __init__(self, index: tuple[slice, ...] | None) -> None:
            self.weight = Parameter((4, 6), index, initial=normal(0.3))
            self.bias = Parameter((6,), None if index is None else index[1:], initial=constant(2))

    whole, shard = Holder(None), Holder(index)
    for module in (whole, shard):
        module.initialise(5, dtype)
    assert shard.weight.data.dtype == shard.weight.grad.dtype == dtype
    np.testing.assert_array_equal(shard.weight.data, whole.weight.data[index])
    np.testing.assert_array_equal(shard.bias.data, np.full(4, 2))
    assert not shard.weight.grad.any()
    expected = 0.3 * random.normal_slab(random.key(5, "weight"), (4, 6), (slice(0, 4), slice(0, 6)))
    np.testing.assert_array_equal(whole.weight.data, expected.astype(dtype))


def test_initialise_again_keeps_the_arrays_and_resets_the_numbers() -> None:
    module = Affine(3, 4)
    module.initialise(0, np.float64)
    data, grad, values = module.weight.data, module.weight.grad, module.weight.data.copy()
    data += 1
    grad += 1
    module.initialise(0, np.float64)
    assert module.weight.data is data and module.weight.grad is grad
    np.testing.assert_array_equal(data, values)
    assert not grad.any()
    module.initialise(1, np.float64)
    assert (data != values).all()


def test_a_module_without_a_body_says_so() -> None:
    with pytest.raises(NotImplementedError):
        Module().forward(1)
    with pytest.raises(NotImplementedError):
        Module().backward(1, None, wgrad.now)
