"""Linears in FP8: exactly the products of operands that are quantised independently here, and near those that are not;
scales of the last steps; weights that are never stale; and planted errors, which the first of these tests finds."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from hpcmp import kernels, wgrad
from hpcmp.arrays import dtype_of
from hpcmp.comm.base import Solo
from hpcmp.kernels import fp8 as specification
from hpcmp.layers.activation import GELU
from hpcmp.layers.fp8 import HISTORY, Factor, Fp8, Fp8Linear, quantised
from hpcmp.layers.linear import ColumnParallelLinear, Output, RowParallelLinear
from hpcmp.layers.mlp import fuse
from hpcmp.layers.parallel import ModelParallel
from hpcmp.models.architecture import Architecture
from hpcmp.models.transformer import block
from hpcmp.module import Module, Residual, Sequential, normal
from hpcmp.recompute import recompute

from .common import place

LENGTH, BATCH = 5, 2


def serial(delayed: bool = False, length: int = LENGTH) -> ModelParallel:
    made = place(length)
    made.products = Fp8(Solo(), np, delayed=delayed)  # type: ignore[arg-type]
    return made


def column(p: ModelParallel) -> ColumnParallelLinear:
    outputs = {"query": Output((3, 4)), "key_value": Output((2, 2, 4))}
    return ColumnParallelLinear(p, 6, outputs, bias=True, initial=normal(0.3))


def row(p: ModelParallel) -> RowParallelLinear:
    return RowParallelLinear(p, (3, 4), 7, bias=True, initial=normal(0.3))


KINDS: dict[str, Any] = {"column": (column, (6,)), "row": (row, (3, 4))}


def rounded(x: Any, format: str) -> np.ndarray[Any, Any]:
    """x in 8 bits under its own scale, as numbers: with logarithms and ml_dtypes in place of bits."""
    kind, most = {"e4m3": (ml_dtypes.float8_e4m3fn, 448.0), "e5m2": (ml_dtypes.float8_e5m2, 57344.0)}[format]
    wide = np.asarray(x, np.float64)
    scale = 2.0 ** math.floor(math.log2(most / abs(wide).max()))
    return np.clip(wide * scale, -most, most).astype(np.float32).astype(kind).astype(np.float64) / scale


def flat(x: Any, last: int) -> np.ndarray[Any, Any]:
    return np.asarray(x, np.float64).reshape(-1, math.prod(x.shape[x.ndim - last :]))


def run(module: Module, shape: tuple[int, ...], dtype: Any, seed: int = 0, size: float = 1.0) -> tuple[Any, ...]:
    """x, the ys, the dys, dx; gradients of weights are in the parameters."""
    rng = np.random.default_rng(seed)
    x = (size * rng.normal(size=(LENGTH, BATCH, *shape))).astype(dtype)
    y, saved = module.forward(x)
    ys = y if isinstance(y, tuple) else (y,)
    dys = tuple((1e-4 * rng.normal(size=each.shape)).astype(dtype) for each in ys)
    queue = wgrad.Queue()
    dx = module.backward(dys if isinstance(y, tuple) else dys[0], saved, queue)
    queue.flush()
    return x, ys, dys, dx


def check(kind: str, dtype: Any) -> None:
    """Output, gradients and bias against products in float64 of what is rounded here; twice, with other weights."""
    make, shape = KINDS[kind]
    module = make(serial())
    parameters = {p.name: p for p in module.initialise(3, dtype)}
    ulp = 1e-5 if dtype == np.float32 else 2**-8
    for seed in (0, 1):
        for p in parameters.values():
            p.data += np.asarray(0.1 * seed, dtype)
            p.grad[...] = 0
            p.version += 1
        x, ys, dys, dx = run(module, shape, dtype, seed)
        matrices = [p for name, p in parameters.items() if "bias" not in name]
        biases = [p for name, p in parameters.items() if "bias" in name]
        expected = 0.0
        q = rounded(flat(x, len(shape)), "e4m3")
        for y, dy, weight, bias in zip(ys, dys, matrices, biases, strict=True):
            w, d = (
                rounded(np.asarray(weight.data, np.float64).reshape(q.shape[1], -1), "e4m3"),
                rounded(flat(dy, dy.ndim - 2), "e5m2"),
            )
            close(flat(y, y.ndim - 2), q @ w + np.asarray(bias.data, np.float64).reshape(-1), ulp)
            close(weight.grad.reshape(w.shape), q.T @ d, 1e-5)
            close(bias.grad.reshape(-1), flat(dy, dy.ndim - 2).sum(0), 1e-5)
            expected = expected + d @ w.T
        close(flat(dx, len(shape)), expected, 2 * ulp)


def close(found: Any, expected: Any, ulp: float) -> None:
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=ulp * abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_multiplies_what_is_rounded_independently(kind: str, dtype: str) -> None:
    check(kind, dtype_of(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_is_near_one_that_is_not_quantised(kind: str) -> None:
    """Within the bounds of roundings to 4 and 3 bits, element by element."""
    make, shape = KINDS[kind]
    plain, eight = make(place(LENGTH)), make(serial())
    for module in (plain, eight):
        module.initialise(3, np.float32)
    (x, ys, dys, dx), (_, ys8, _, dx8) = run(plain, shape, np.float32), run(eight, shape, np.float32)
    sizes = abs(flat(x, len(shape)))
    u, v = 2.0**-4, 2.0**-3
    total, matrices = 0.0, [p for p in plain.parameters() if "bias" not in p.name]
    for y, y8, dy, p, p8 in zip(
        ys, ys8, dys, matrices, (p for p in eight.parameters() if "bias" not in p.name), strict=True
    ):
        w, d = abs(p.data.reshape(sizes.shape[1], -1)), abs(flat(dy, dy.ndim - 2))
        assert (abs(flat(y - y8, y.ndim - 2)) <= 1.01 * (2 * u + u * u) * (sizes @ w)).all()
        assert (abs(p.grad - p8.grad).reshape(w.shape) <= 1.01 * (u + v + u * v) * (sizes.T @ d) + 1e-12).all()
        assert (p.grad != p8.grad).any() and (y != y8).any()
        total = total + d @ w.T
    assert (abs(flat(dx - dx8, len(shape))) <= 1.01 * (u + v + u * v) * total).all()


def invert(function: Any) -> Any:
    def wrong(*args: Any, **settings: Any) -> Any:
        rows, columns, inverse = function(*args, **settings)
        return rows, columns, 1 / inverse

    return wrong


@pytest.mark.parametrize("planted", ["inverse", "stale", "format"])
def test_planted_errors_are_found(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale in the place of its inverse; weights quantised once for all; gradients in E4M3."""
    if planted == "inverse":
        monkeypatch.setattr(kernels.CPU, "quantise", invert(specification.quantise))
    elif planted == "stale":
        monkeypatch.setattr("hpcmp.layers.fp8.quantised", lambda p, rows: (p.derived or (0, quantised(p, rows)))[1])
    else:
        monkeypatch.setattr(Fp8Linear, "gradient", lambda self, dy, *args: self._factor(dy, 0, "e4m3", summed=True))
    with pytest.raises(AssertionError):
        check("row", np.dtype("float32"))


def leaves(tree: Any) -> list[Any]:
    """The arrays in what a module keeps, as they were allocated."""
    if isinstance(tree, Factor):
        tree = list(vars(tree).values())
    if isinstance(tree, np.ndarray):
        return [tree if tree.base is None else tree.base]
    return [leaf for each in tree for leaf in leaves(each)] if isinstance(tree, list | tuple) else []


def size(tree: Any) -> int:
    """Bytes of it, each array once."""
    return sum({id(leaf): leaf.nbytes for leaf in leaves(tree)}.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_keeps_codes_alone(kind: str) -> None:
    """Of x^T until the backward, of x^T and dy^T until the weight's gradient is made: neither array lives on."""
    make, shape = KINDS[kind]
    module = make(serial())
    module.initialise(3, np.float32)
    x = np.random.default_rng(0).normal(size=(LENGTH, BATCH, *shape)).astype(np.float32)
    alive, number, queue = weakref.ref(x), x.size, wgrad.Queue()
    y, saved = module.forward(x)
    del x
    assert alive() is None and size(saved) == number + 4
    dys = tuple(np.ones_like(each) for each in y) if kind == "column" else np.ones_like(y)
    gone = [weakref.ref(dy) for dy in leaves(dys)]
    module.backward(dys, saved, queue)
    del dys
    ((_, kept),) = queue.items
    outputs = [each.size for each in (y if kind == "column" else (y,))]
    sums = 4 * sum(outputs) // (LENGTH * BATCH)  # a row, of so few
    assert not any(dy() is not None for dy in gone)
    assert size(kept) == number + 4 + sum(outputs) + 4 * len(outputs) + sums


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_whose_input_stays_keeps_that_and_makes_the_same(kind: str, delayed: bool) -> None:
    results = []
    for stays in (False, True):
        p = serial(delayed)
        module = KINDS[kind][0](p)
        module.input_stays = stays
        parameters, found = module.initialise(3, np.float32), []
        for seed in range(3):
            p.products.begin()
            x, ys, _, dx = run(module, KINDS[kind][1], np.float32, seed)
            found += [*ys, dx, *(q.grad.copy() for q in parameters)]
            p.products.advance(np.ones(1))
        results.append([*found, *(history.copy() for _, history in p.products.state())])
        assert (module.forward(x)[1] is x) == stays
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.mpi
def test_a_shard_that_is_gathered_again_is_kept_itself(parallel: ModelParallel) -> None:
    parallel.products = Fp8(Solo(), np, delayed=False)  # type: ignore[arg-type]
    module = column(parallel)
    module.initialise(3, np.float32)
    x = np.ones((parallel.cursor.place.length, BATCH, 6), np.float32)[parallel.positions()]
    gathered = parallel.sequence and parallel.tp.size > 1
    saved = module.forward(x)[1]
    assert saved is x if gathered else size(saved) == x.size + 4


#: Bytes that a block keeps, by its style and what is made again, of bfloat16 and in FP8: a number of hidden each.
KEPT = {
    ("gpt", "none"): (32.5, 26.5),
    ("gpt", "attention"): (30.25, 24.25),
    ("gpt", "activations"): (20.25, 20.25),
    ("llama", "none"): (32.875, 28.125),
    ("llama", "activations"): (23.25, 23.25),
    ("llama", "full"): (2, 2),
}


@pytest.mark.parametrize(("style", "kind"), KEPT)
def test_what_a_block_keeps(style: str, kind: str) -> None:
    """1 byte in place of 2 of what the products before attention and of the MLP read; and no more in other cases."""
    settings = {"heads": 4, "kv_heads": 4, "head_size": 16, "ffn": 256 if style == "gpt" else 176}
    a = Architecture(style=style, hidden=64, layers=1, vocabulary=7, sequence=64, **settings)
    x, found = np.random.default_rng(0).normal(size=(64, 2, 64)).astype(dtype_of("bfloat16")), []
    for p in (place(64), serial(length=64)):
        made = block(a, p, "blocks/0")
        made.initialise(0, dtype_of("bfloat16"))
        found.append(size(recompute(fuse(made) if kind == "none" else made, kind).forward(x)[1]) / x.size)
    assert found[0] == KEPT[style, kind][0] and found[1] == pytest.approx(KEPT[style, kind][1], abs=2e-3)


def mlp(p: ModelParallel) -> Sequential:
    up, down = (
        ColumnParallelLinear(p, 6, {"weight": Output((16,))}, bias=True),
        RowParallelLinear(p, (16,), 6, bias=True),
    )
    return Sequential(mlp=Residual(up=up, activation=GELU(), down=down))


def test_an_mlp_is_not_fused_and_can_be_made_again() -> None:
    p = serial()
    kept, again = fuse(mlp(p)), recompute(mlp(p), "activations")
    (part,) = kept.layers.values()
    assert isinstance(part, Residual) and list(part.layers) == ["up", "activation", "down"]
    results = []
    for module in (kept, again):
        parameters = module.initialise(3, np.float32)
        _, (y,), _, dx = run(module, (6,), np.float32)
        results.append([y, dx, *(p.grad for p in parameters)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, float]]]:
    """(format, what the scale was made of) of every quantisation."""
    seen: list[tuple[str, float]] = []

    def quantise(x: Any, largest: Any, format: str, *args: Any, **settings: Any) -> Any:
        seen.append((format, float(largest[0])))
        return specification.quantise(x, largest, format, *args, **settings)

    monkeypatch.setattr(kernels.CPU, "quantise", quantise)
    yield seen


def test_delayed_scales_are_of_the_last_steps(watched: list[tuple[str, float]]) -> None:
    """The first step's of what is at hand; then of the largest of 16 steps, of all their microbatches."""
    p = serial(delayed=True)
    module, products = row(p), p.products
    module.initialise(3, np.float32)
    sizes, largest = [1, 8, 2, 1, 4, *[1] * 20], []
    for step, size in enumerate(sizes):
        products.begin()
        largest.append(0.0)
        for microbatch in range(2):
            watched.clear()
            x, *_ = run(module, (3, 4), np.float32, 2 * step + microbatch, size)
            now = float(abs(x).max())
            largest[-1] = max(largest[-1], now)
            used = {value for format, value in watched if format == "e4m3"} - {float(abs(module.weight.data).max())}
            assert used == {max(largest[max(0, step - HISTORY) : step], default=now)}, (step, microbatch)
        products.advance(np.ones(1))
    assert largest.index(max(largest)) == 1 and len(set(largest)) > HISTORY


def test_what_came_to_nothing_and_what_is_evaluated_leave_no_trace(watched: list[tuple[str, float]]) -> None:
    p = serial(delayed=True)
    module, products = row(p), p.products
    module.initialise(3, np.float32)
    products.begin()
    run(module, (3, 4), np.float32)
    products.advance(np.full(1, np.nan))  # not the first step yet
    products.begin()
    watched.clear()
    x, *_ = run(module, (3, 4), np.float32, 1, 64)
    assert ("e4m3", float(abs(x).max())) in watched
    products.advance(np.ones(1))
    ((name, history),) = products.state()
    assert name == "fp8/weight" and history.shape == (2, HISTORY)
    before = history.copy()
    products.begin()
    run(module, (3, 4), np.float32, 2, 1000)
    products.begin()
    assert not products.magnitudes[2].any()  # type: ignore[attr-defined]
    np.testing.assert_array_equal(history, before)


def test_a_number_beyond_the_last_steps_is_the_largest_code() -> None:
    p = serial(delayed=True)
    module = row(p)
    module.initialise(3, np.float32)
    p.products.begin()
    run(module, (3, 4), np.float32)
    p.products.advance(np.ones(1))
    factor, _ = module.products.input(np.full((1, 1, 12), 1e6, np.float32))
    assert (factor.codes == 0x7E).all()


def test_weights_are_quantised_once_and_in_the_same_place(watched: list[tuple[str, float]]) -> None:
    p = serial()
    module = row(p)
    module.initialise(3, np.float32)
    weight, products = module.weight, p.products
    products.begin()
    first = quantised(weight, 2)
    codes = first.codes.copy()
    watched.clear()
    run(module, (3, 4), np.float32)
    assert len(watched) == 2  # x and dy
    weight.data *= 3
    weight.version += 1
    products.begin()
    again = quantised(weight, 2)
    assert len(watched) == 3 and again.codes is first.codes and (again.codes != codes).any()
    np.testing.assert_array_equal(again.turned, again.codes.T)
