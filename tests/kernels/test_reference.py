"""The reference kernels: forward against an independent formula, backward against finite differences of forward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from hpcmp import kernels
from hpcmp.arrays import Array
from hpcmp.kernels import attention, reference
from tests.kernels.test_kernels import attention_mask

RNG = np.random.default_rng


# --- backward against finite differences of forward --------------------------------------------------------------


def check_backward(
    forward: Callable[..., Array], inputs: list[Array], gradients: Callable[[Array], tuple[Array, ...]]
) -> None:
    """(f(x + h d) - f(x - h d)) . dy / 2h = d . dx, along random directions, for each input alone."""
    rng, h = RNG(5), 1e-5
    dy = rng.normal(size=forward(*inputs).shape)
    for i, gradient in enumerate(gradients(dy)):
        assert gradient.shape == inputs[i].shape
        for _ in range(3):
            d = rng.normal(size=inputs[i].shape)
            moved = [[*inputs[:i], inputs[i] + sign * h * d, *inputs[i + 1 :]] for sign in (1, -1)]
            ends = [forward(*each) for each in moved]
            numeric, analytic = ((ends[0] - ends[1]) * dy).sum() / (2 * h), (gradient * d).sum()
            assert abs(numeric - analytic) < 1e-7 * max(1.0, float(np.linalg.norm(gradient) * np.linalg.norm(d)))


def draw(*shape: int) -> Array:
    return RNG(shape).normal(size=shape)


def test_matmul_backward() -> None:
    def gradients(dy: Array) -> tuple[Array, Array, Array]:
        grad, sums = np.ones((7, 5)), np.ones(5)
        reference.add_outer(grad, x, dy)
        reference.add_rows(sums, dy)
        return reference.matmul_transposed(dy, w), grad - 1, sums - 1  # added to what was there

    x, w, bias = draw(3, 2, 7), draw(7, 5), draw(5)
    check_backward(reference.matmul, [x, w, bias], gradients)


def test_gelu_backward() -> None:
    x = np.concatenate([draw(40), 4 * draw(41)])
    check_backward(reference.gelu, [x], lambda dy: (reference.gelu_backward(dy, x),))


def test_swiglu_backward() -> None:
    x = 2 * draw(3, 4, 2, 5)
    check_backward(reference.swiglu, [x], lambda dy: (reference.swiglu_backward(dy, x),))


def test_layer_norm_backward() -> None:
    x, w, b = draw(3, 2, 7), draw(7), draw(7, 1)[:, 0]

    def gradients(dy: Array) -> tuple[Array, ...]:
        _, mean, rstd = reference.layer_norm(x, w, b, 1e-3)
        dw, db = reference.layer_norm_backward_weight(dy, x, mean, rstd)
        return reference.layer_norm_backward(dy, x, w, mean, rstd), dw, db

    check_backward(lambda x, w, b: reference.layer_norm(x, w, b, 1e-3)[0], [x, w, b], gradients)


def test_rms_norm_backward() -> None:
    x, w = draw(3, 2, 7), draw(7)

    def gradients(dy: Array) -> tuple[Array, ...]:
        _, rstd = reference.rms_norm(x, w, 1e-3)
        return reference.rms_norm_backward(dy, x, w, rstd), reference.rms_norm_backward_weight(dy, x, rstd)

    check_backward(lambda x, w: reference.rms_norm(x, w, 1e-3)[0], [x, w], gradients)


def test_rope_backward_is_the_opposite_rotation() -> None:
    x, angle = draw(5, 2, 3, 8), draw(5, 1, 1, 4)
    cos, sin = np.cos(angle), np.sin(angle)
    check_backward(
        lambda x: reference.rope(x.copy(), cos, sin), [x], lambda dy: (reference.rope(dy.copy(), cos, -sin),)
    )
    beside = draw(5, 2, 3, 11)
    turned = reference.rope(beside.copy(), cos, sin)
    np.testing.assert_array_equal(turned[..., :8], reference.rope(beside[..., :8].copy(), cos, sin))
    np.testing.assert_array_equal(turned[..., 8:], beside[..., 8:])


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(("heads", "groups"), [(6, 3), (5, 1), (3, 3)])
@pytest.mark.parametrize(("keys", "causal"), [(5, True), (5, False), (3, False)])
def test_attention_backward(heads: int, groups: int, dropout: bool, keys: int, causal: bool) -> None:
    q, kv = draw(5, 2, heads, 4), draw(keys, 2, groups, 2, 4)
    keep = attention_mask(5, 2, heads, keys) if dropout else None

    def gradients(dy: Array) -> tuple[Array, ...]:
        o, lse = attention.attention(q, kv, 0.4, keep, causal)
        return attention.attention_backward(dy, q, kv, o, lse, 0.4, keep, causal)

    check_backward(lambda q, kv: attention.attention(q, kv, 0.4, keep, causal)[0], [q, kv], gradients)


@pytest.mark.parametrize("cuts", [(2,), (0, 7), (1, 4)])
def test_blocks_of_keys_merge_to_attention_of_all(cuts: tuple[int, ...]) -> None:
    """Forward and backward, block by block; some blocks are empty. The scores differ by more than exp can."""
    q, kv, dy = 300 * draw(5, 2, 6, 4), draw(7, 2, 3, 2, 4), draw(5, 2, 6, 4, 2)[..., 1]
    keep = replace(attention_mask(5, 2, 6, 0), runs=(slice(0, 7),))
    whole = attention.attention(q, kv, 1.0, keep, False)
    parts = [slice(a, b) for a, b in zip((0, *cuts), (*cuts, 7), strict=True)]
    o, lse = np.zeros_like(q), np.full((2, 6, 5), -np.inf)  # of no keys
    with np.errstate(all="raise", under="ignore"):
        for part in parts:
            block = attention.attention(q, kv[part], 1.0, replace(keep, runs=(part,)), False)
            o, lse = attention.merge_attention(o, lse, *block)
    for a, b in zip((o, lse), whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    expected = attention.attention_backward(dy, q, kv, *whole, 1.0, keep, False)
    found = [attention.attention_backward(dy, q, kv[s], o, lse, 1.0, replace(keep, runs=(s,)), False) for s in parts]
    dq, dkv = sum(f[0] for f in found), np.concatenate([f[1] for f in found])
    for a, b in zip((dq, dkv), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * abs(b).max())


def test_embedding_backward() -> None:
    table, ids = draw(6, 4), np.array([[3, 4], [9, 3], [12, 0]])  # rows 3 to 8 are here; 3 occurs twice

    def gradients(dy: Array) -> tuple[Array, ...]:
        grad = np.ones(table.shape)
        reference.embedding_backward_weight(grad, ids, 3, dy)
        return (grad - 1,)

    check_backward(lambda t: reference.embedding(t, ids, 3), [table], gradients)


def test_cross_entropy_backward() -> None:
    logits, targets = 3 * draw(4, 2, 6), np.array([[0, 5], [3, 3], [-1, 2], [1, -1]])

    def loss(logits: Array) -> Array:
        top, total, chosen = reference.cross_entropy_parts(logits, targets, 0)
        return np.where(targets >= 0, top + np.log(total) - chosen, 0)

    def gradients(dy: Array) -> tuple[Array, ...]:
        lse = np.logaddexp.reduce(logits, -1)
        return (reference.cross_entropy_backward(dy * (targets >= 0), logits.copy(), targets, 0, lse),)

    check_backward(loss, [logits], gradients)


# --- forward against an independent formula ----------------------------------------------------------------------


def test_matmul_is_a_sum_of_products() -> None:
    x, w = draw(3, 2, 7), draw(7, 5)
    expected = np.einsum("sbi,io->sbo", x, w)
    np.testing.assert_allclose(reference.matmul(x, w), expected, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(reference.matmul(x, w, w[0]), expected + w[0], rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(
        reference.matmul_transposed(draw(3, 2, 5), w),
        np.einsum("sbo,io->sbi", draw(3, 2, 5), w),
        rtol=1e-13,
        atol=1e-13,
    )


def test_gelu_is_close_to_x_times_the_normal_distribution() -> None:
    """The tanh form is within 5e-4 of x Phi(x), and exactly y(x) - y(-x) = x; known values, to 8 digits."""
    x = np.linspace(-6, 6, 1001)
    exact = x * np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
    assert np.abs(reference.gelu(x) - exact).max() < 5e-4
    np.testing.assert_allclose(reference.gelu(x) - reference.gelu(-x), x, rtol=1e-13, atol=1e-13)
    known = [0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * 1.044715)), 0.84119199]
    np.testing.assert_allclose(reference.gelu(np.array([1.0, 1.0])), known, rtol=1e-8)


def test_swiglu_is_gate_times_sigmoid_times_up() -> None:
    x = 3 * draw(3, 2, 5)
    gate, up = x[:, 0], x[:, 1]
    np.testing.assert_allclose(reference.swiglu(x), gate * 0.5 * (1 + np.tanh(gate / 2)) * up, atol=1e-14)


def test_layer_norm_normalises_each_row() -> None:
    x, w, b = 3 + 2 * draw(4, 2, 9), draw(9), draw(9, 1)[:, 0]
    y, mean, rstd = reference.layer_norm(x, w, b, 1e-5)
    for i in np.ndindex(4, 2):
        row = x[i]
        variance = sum((v - row.mean()) ** 2 for v in row) / 9
        np.testing.assert_allclose(y[i], (row - row.mean()) / math.sqrt(variance + 1e-5) * w + b, rtol=1e-12)
        np.testing.assert_allclose([mean[i][0], rstd[i][0]], [row.mean(), 1 / math.sqrt(variance + 1e-5)], rtol=1e-12)


def test_rms_norm_normalises_each_row() -> None:
    x, w = 3 + 2 * draw(4, 2, 9), draw(9)
    y, _ = reference.rms_norm(x, w, 1e-5)
    for i in np.ndindex(4, 2):
        np.testing.assert_allclose(y[i], x[i] / math.sqrt(sum(v * v for v in x[i]) / 9 + 1e-5) * w, rtol=1e-12)


def test_rope_is_a_complex_rotation() -> None:
    x, angle = draw(5, 2, 3, 8), draw(5, 1, 1, 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
    y = reference.rope(x, np.cos(angle), np.sin(angle))
    np.testing.assert_allclose(y, np.concatenate([turned.real, turned.imag], -1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dropout", [False, True])
def test_attention_row_by_row(dropout: bool) -> None:
    s, b, n, k, d = 5, 2, 6, 3, 4
    q, key, v = draw(s, b, n, d), draw(s, b, k, d), draw(d, k, b, s).T
    keep = attention_mask(s, b, n, s) if dropout else None
    o, lse = attention.attention(q, np.stack([key, v], -2), 0.3, keep)
    for t, i, head in np.ndindex(s, b, n):
        group = head // (n // k)
        scores = [0.3 * float(q[t, i, head] @ key[u, i, group]) for u in range(t + 1)]
        weights = np.exp(scores) / np.exp(scores).sum()
        if keep is not None:
            weights = weights * keep.scaled(np.float64)[i, head, t, : t + 1]
        expected = sum(w * v[u, i, group] for u, w in enumerate(weights))
        np.testing.assert_allclose(o[t, i, head], expected, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(lse[i, head, t], math.log(sum(map(math.exp, scores))), rtol=1e-12, atol=1e-14)


def test_embedding_is_the_rows_that_are_here() -> None:
    table, ids = draw(6, 4), np.array([[3, 4], [9, 8], [12, 0]])
    y = reference.embedding(table, ids, 3)
    for i in np.ndindex(3, 2):
        expected = table[ids[i] - 3] if 3 <= ids[i] < 9 else np.zeros(4)
        np.testing.assert_array_equal(y[i], expected)


@pytest.mark.parametrize("cuts", [[0, 6], [0, 2, 5, 6], [0, 0, 3, 3, 6]])
def test_cross_entropy_of_a_vocabulary_in_parts(cuts: list[int]) -> None:
    """The maximum, then the sums, over any parts of the vocabulary give -log softmax."""
    logits, targets = 3 * draw(4, 2, 6), np.array([[0, 5], [3, 3], [-1, 2], [1, 4]])
    parts = [(a, logits[..., a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    sums = [reference.cross_entropy_parts(part, targets, first) for first, part in parts]
    tops, totals, those = zip(*sums, strict=True)
    top = np.max(tops, 0)
    np.testing.assert_array_equal(top, logits.max(-1))
    total = sum(each * np.exp(mine - top) for mine, each in zip(tops, totals, strict=True))
    chosen = np.where(targets >= 0, sum(those) - top, 0)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for i in np.ndindex(4, 2):
        expected = -math.log(probabilities[i][targets[i]]) if targets[i] >= 0 else math.log(total[i])
        np.testing.assert_allclose(math.log(total[i]) - chosen[i], expected, rtol=1e-12, atol=1e-13)
    scale, lse = draw(4, 2), top + np.log(total)
    found = [reference.cross_entropy_backward(scale, part.copy(), targets, first, lse) for first, part in parts]
    one_hot = np.where(targets[..., None] == np.arange(6), 1, 0)
    np.testing.assert_allclose(
        np.concatenate(found, -1), scale[..., None] * (probabilities - one_hot), rtol=1e-12, atol=1e-14
    )


def test_square_sum_is_accumulated_in_double_precision() -> None:
    x = RNG(0).normal(size=70_001).astype(np.float32)
    expected = math.fsum(float(v) ** 2 for v in x)
    for kernel_set in (reference, kernels.NUMPY, kernels.CPU):
        assert abs(kernel_set.square_sum(x) / expected - 1) < 1e-12
        assert kernel_set.square_sum(np.full(3, 1e30, np.float32)) > 2e60  # no overflow
