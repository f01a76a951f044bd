"""The router: which experts each token goes to, with what weights, and the losses that keep experts in use."""

from __future__ import annotations

import math
from typing import Any, Literal

from ... import kernels
from ...arrays import Array, array_module, wide
from ...module import Initial, Module
from ...wgrad import WGrad
from ..parallel import ModelParallel

#: What is in ``Cursor.losses``.
LOSSES = ("balance", "z", "choices", "dropped")


class Router(Module):
    """Of the scores s(x W) of e experts, the ``per_token`` = k largest, and their weights g.

        s = softmax(x W) or sigmoid(x W),   g_j = s_j / sum over the k chosen of s,   or s_j itself where k = 1

    x (S, batch, h), this rank's context; (gates (T, k), chosen (T, k)) with T = S batch, token by token: gates in
    single precision at least, as all of the router's arithmetic is; chosen are experts, or ``experts`` (one past the
    last) for a choice that is dropped. Ties go to the lower expert.

    Two losses of its own are part of what is minimised, each a mean over the global batch, times its weight:

        balance  of a sample: e sum_e f_e P_e,  f_e the fraction of its choices that are e (a constant to the gradient),
                 P_e the mean over its positions of s_e / sum s;  1 at an even load, e if all goes to one expert
        z        of a token: (log sum_e exp (x W)_e)^2

    Samples are whole sequences: f is summed over cp, so that no layout changes it. The sums over tokens (a sample
    counts as its length) go to ``Cursor.losses`` in the backward, with the number of choices ("choices") and of dropped
    ones ("dropped"), from the first rank of tp alone, as their gradients do: W owes a sum over tp.

    capacity: a sample of length L has room for C = ceil(capacity L k / e) tokens at each expert; later ones, in the
    order of positions, are dropped (and nothing else is renormalised). Whether a token is dropped depends on no later
    one. None: nothing is dropped.

    Softmax and balance: Fedus, Zoph and Shazeer, "Switch transformers", 2021, equations 1 to 5; the sigmoid, the
    weights of the k chosen and the balance of a sequence: DeepSeek-AI, "DeepSeek-V3", 2024, equations 12 to 20; z: Zoph
    et al., "ST-MoE", 2022, equation 5; capacity: Lepikhin et al., "GShard", 2020, section 2.2.
    """

    def __init__(
        self,
        parallel: ModelParallel,
        features: int,
        experts: int,
        per_token: int,
        *,
        kind: Literal["softmax", "sigmoid"] = "softmax",
        capacity: float | None = None,
        balance_loss: float = 0.0,
        z_loss: float = 0.0,
        initial: Initial | None = None,
    ) -> None:
        self.parallel, self.experts, self.per_token = parallel, experts, per_token
        self.kind, self.capacity = kind, capacity
        self.balance_loss, self.z_loss = balance_loss, z_loss
        self.weight = parallel.replicated(features, experts, initial=initial)
        self.weight.shared = ("tp",)  # what comes back through the gates is partial over tp, and so is dW

    def forward(self, x: Array) -> tuple[tuple[Array, Array], Any]:
        whole, xp = _wide(x), array_module(x)
        k = kernels.of(whole)
        logits = k.matmul(whole, _wide(self.weight.data))
        scores, lse = k.router_scores(logits, self.kind)
        chosen = k.top_k(logits, self.per_token)
        gates = xp.take_along_axis(scores, chosen, -1)
        if self.per_token > 1:
            gates = gates / gates.sum(-1, keepdims=True)
        sent = chosen if self.capacity is None else self._within(chosen)
        pairs = chosen.size // self.per_token, self.per_token
        return (gates.reshape(pairs), sent.reshape(pairs)), (x, logits, scores, lse, chosen, gates, sent)

    def backward(self, dgates: Array, saved: Any, wgrad: WGrad) -> Array:
        """dx of this rank of tp, given dgates of this rank: both are summands."""
        x, logits, scores, lse, chosen, gates, sent = saved
        k, xp = kernels.of(logits), array_module(x)
        dgates = dgates.reshape(gates.shape)
        if self.per_token > 1:
            total = xp.take_along_axis(scores, chosen, -1).sum(-1, keepdims=True)
            dgates = (dgates - (dgates * gates).sum(-1, keepdims=True)) / total
        dscores = xp.zeros_like(scores)
        s, b, _ = scores.shape
        dscores[xp.arange(s)[:, None, None], xp.arange(b)[:, None], chosen] = dgates
        fraction = self._fraction(chosen)  # on every rank: it is a collective over cp
        first = self.parallel.tp.rank == 0
        if first:
            self._count(scores, lse, fraction, chosen, sent)
            total = scores.sum(-1, keepdims=True)
            dp = self.balance_loss * self.parallel.cursor.place.weight * self.experts * fraction
            dscores += (dp - (dp * scores / total).sum(-1, keepdims=True)) / total
        dlogits = k.router_scores_backward(dscores, scores, self.kind)
        if first:
            dlogits += 2 * self.z_loss * self.parallel.cursor.place.weight * lse * xp.exp(logits - lse)
        wgrad(self.backward_weight, x, dlogits)
        return k.matmul_transposed(dlogits, _wide(self.weight.data)).astype(x.dtype)

    def backward_weight(self, x: Array, dlogits: Array) -> None:
        """dW += x^T dlogits."""
        kernels.of(dlogits).add_outer(self.weight.grad, _wide(x), dlogits)

    def _within(self, chosen: Array) -> Array:
        """``chosen``, with ``experts`` for the choices of this rank's positions that are beyond the capacity."""
        k, xp = kernels.of(chosen), array_module(chosen)
        assert self.capacity is not None
        length, here = self.parallel.cursor.place.length, xp.asarray(self.parallel.context())
        whole = xp.zeros((length, *chosen.shape[1:]), chosen.dtype)
        whole[here] = chosen
        whole = self.parallel.cp.all_reduce(whole).wait()
        most = math.ceil(self.capacity * length * self.per_token / self.experts)
        kept = k.within_capacity(whole, self.experts, most)[here]
        return xp.where(kept, chosen, self.experts)

    def _fraction(self, chosen: Array) -> Array:
        """f (batch, e): of each whole sample."""
        counts = kernels.of(chosen).membership(chosen, self.experts).sum(0)
        whole = self.parallel.cp.all_reduce(counts).wait()
        return whole / (self.parallel.cursor.place.length * self.per_token)

    def _count(self, scores: Array, lse: Array, fraction: Array, chosen: Array, sent: Array) -> None:
        """Add this rank's positions to ``Cursor.losses``."""
        found = {
            "balance": self.experts * (fraction * (scores / scores.sum(-1, keepdims=True))).sum(dtype="float64"),
            "z": (lse * lse).sum(dtype="float64"),
            "choices": chosen.size,
            "dropped": (sent == self.experts).sum(),
        }
        losses = self.parallel.cursor.losses
        for name, value in found.items():
            losses[name] = losses.get(name, 0.0) + value  # where it is: the host waits for none


def _wide(x: Array) -> Array:
    """In single precision at least."""
    return x.astype(wide(x.dtype), copy=False)
