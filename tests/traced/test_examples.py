"""A loss and a layer as users write them, against their formulas by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcmp.traced import Traced
from hpcmp.wgrad import now
from tests.traced.cases import parameter

rng = np.random.default_rng(0)


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
