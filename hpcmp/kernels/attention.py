"""The specification of the kernels of attention, to a block of keys, as ``reference`` is of the others."""

from __future__ import annotations

from ..arrays import Array, array_module
from ..documents import First
from ..random import DropoutMask


def attention(
    q: Array,
    kv: Array,
    scale: float,
    mask: DropoutMask | None = None,
    causal: bool = True,
    first: First | None = None,
) -> tuple[Array, Array]:
    """Attention of grouped heads to a block of keys: o = (P m) v, P = softmax(scale q k^T) over the keys.

    q (s, b, n, d), kv (t, b, k, 2, d) holding keys and values; query head i reads key-value head i // (n/k). causal: s
    and t are the same positions, and a query sees the keys up to its own; else every query sees every key. first: of
    these, it sees only the keys from this row on (if causal, its own is among them). mask: what dropout keeps,
    (b, n, s, t); m = keep / (1 - rate), or 1. Returns o, shaped as q, and the log-sum-exp of each row of scores,
    (b, n, s), from which backward makes P again: nothing of size s x t is kept. For a query that sees no key, o is zero
    and the log-sum-exp -inf. Vaswani et al., 2017; Ainslie et al., "GQA", 2023; the recomputation is that of Dao et
    al., "FlashAttention", 2022, section 3.1.
    """
    k, v = kv[..., 0, :], kv[..., 1, :]
    xp = array_module(q)
    s, b, n, _ = q.shape
    if k.shape[0] == 0:
        return xp.zeros_like(q), xp.full((b, n, s), -xp.inf, q.dtype)
    scores = _scores(q, k, scale, causal, first)
    top = scores.max(-1, keepdims=True)
    p = xp.exp(scores - xp.where(top == -xp.inf, 0, top))  # a row may see no key
    total = p.sum(-1, keepdims=True)
    p /= xp.where(total == 0, 1, total)
    if mask is not None:
        p *= mask.scaled(p.dtype, xp).reshape(p.shape)
    o = p @ _grouped(v, v.shape[2])
    return _ungrouped(o), (top + xp.log(xp.where(total == 0, 1, total))).reshape(b, n, s)


def attention_backward(
    do: Array,
    q: Array,
    kv: Array,
    o: Array,
    lse: Array,
    scale: float,
    mask: DropoutMask | None = None,
    causal: bool = True,
    first: First | None = None,
) -> tuple[Array, Array]:
    """dv = (P m)^T do, dS = P (m (do v^T) - rowsum(do o)), dq = scale dS k, dk = scale dS^T q; (dq, dkv).

    Where q attends to several blocks of keys, o and lse are those over all of them (``merge_attention``): dkv is then
    this block's, and dq this block's part of a sum.
    """
    k, v = kv[..., 0, :], kv[..., 1, :]
    xp = array_module(q)
    groups = k.shape[2]
    scores = _scores(q, k, scale, causal, first)
    lse = lse.reshape(*scores.shape[:-1], 1)
    p = xp.exp(scores - xp.where(lse == -xp.inf, 0, lse))
    dog, qg = _grouped(do, groups), _grouped(q, groups)
    dp = dog @ _grouped(v, groups).swapaxes(-1, -2)
    dropped = p
    if mask is not None:
        scaled = mask.scaled(p.dtype, xp).reshape(p.shape)
        dropped, dp = p * scaled, dp * scaled
    dv = dropped.swapaxes(-1, -2) @ dog
    ds = p * (dp - (dog * _grouped(o, groups)).sum(-1, keepdims=True))
    ds *= scale
    dq, dk = ds @ _grouped(k, groups), ds.swapaxes(-1, -2) @ qg
    dkv = xp.stack([_ungrouped(dk.sum(2, keepdims=True)), _ungrouped(dv.sum(2, keepdims=True))], -2)
    return _ungrouped(dq), dkv


def merge_attention(o1: Array, lse1: Array, o2: Array, lse2: Array) -> tuple[Array, Array]:
    """Attention to two blocks of keys from that to each: lse = log(e^lse1 + e^lse2), o = sum_i e^(lse_i - lse) o_i.

    o (s, b, n, d), lse (b, n, s), as ``attention`` returns them; a block without keys has -inf and no weight. Milakov
    and Gimelshein, "Online normalizer calculation for softmax", 2018; Liu et al., "Ring attention", 2023.
    """
    xp = array_module(o1)
    lse = xp.logaddexp(lse1, lse2)
    finite = xp.where(lse == -xp.inf, 0, lse)  # else exp(-inf + inf)
    w1, w2 = (xp.exp(part - finite).transpose(2, 0, 1)[..., None] for part in (lse1, lse2))
    return o1 * w1 + o2 * w2, lse


def _grouped(x: Array, groups: int) -> Array:
    """(s, b, n, d) -> (b, groups, n/groups, s, d), without a copy."""
    s, b, n, d = x.shape
    return x.reshape(s, b, groups, n // groups, d).transpose(1, 2, 3, 0, 4)


def _ungrouped(x: Array) -> Array:
    b, groups, g, s, d = x.shape
    return x.transpose(3, 0, 1, 2, 4).reshape(s, b, groups * g, d)


def _scores(q: Array, k: Array, scale: float, causal: bool, first: First | None) -> Array:
    """scale q k^T; with -inf at the keys before ``first`` and, if causal, after the query's own position."""
    xp = array_module(q)
    groups, s = k.shape[2], q.shape[0]
    scores = _grouped(q * q.dtype.type(scale), groups) @ _grouped(k, groups).swapaxes(-1, -2)
    if causal:
        scores += xp.where(xp.tri(s, dtype=bool), 0, -xp.inf).astype(q.dtype)
    if first is not None:
        unseen = xp.arange(k.shape[0]) < first.rows[:, :, None]
        scores += xp.where(unseen, -xp.inf, 0).astype(q.dtype)[:, None, None]
    return scores
