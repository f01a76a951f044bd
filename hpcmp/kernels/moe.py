"""The kernels of a mixture of experts, in NumPy-API code for NumPy and CuPy arrays: choosing, and adding up.

Shapes: t tokens, e experts, k experts a token, h hidden; a leading ``...`` is any shape.
"""

from __future__ import annotations

from ..arrays import Array, array_module
from .reference import _sigmoid


def router_scores(logits: Array, kind: str) -> tuple[Array, Array]:
    """(softmax or sigmoid of the logits, log sum_e exp(logits)). logits (..., e); the second (..., 1)."""
    xp = array_module(logits)
    top = logits.max(-1, keepdims=True)
    exponentials = xp.exp(logits - top)
    total = exponentials.sum(-1, keepdims=True)
    scores = exponentials / total if kind == "softmax" else _sigmoid(logits)
    return scores, top + xp.log(total)


def router_scores_backward(dscores: Array, scores: Array, kind: str) -> Array:
    """dlogits: s (ds - sum ds s) of a softmax, ds s (1 - s) of a sigmoid."""
    if kind == "softmax":
        return scores * (dscores - (dscores * scores).sum(-1, keepdims=True))
    return dscores * scores * (1 - scores)


def top_k(x: Array, k: int) -> Array:
    """The places of the k largest along the last axis, the largest first, of equal ones the first. (..., e) -> (..., k)

    k passes of argmax: for the few experts of a token that is less work than a sort, and settles ties everywhere alike.
    """
    xp = array_module(x)
    places = xp.arange(x.shape[-1])
    chosen = []
    for _ in range(k):
        chosen.append(x.argmax(-1))
        x = xp.where(places == chosen[-1][..., None], -xp.inf, x)
    return xp.stack(chosen, -1)


def membership(chosen: Array, experts: int) -> Array:
    """Whether each expert is among the chosen. (..., k) -> (..., e) booleans."""
    return (chosen[..., None] == array_module(chosen).arange(experts)).any(-2)


def within_capacity(chosen: Array, experts: int, most: int) -> Array:
    """Which choices are among the first ``most`` of their expert and sample, counted along the positions.

    chosen (s, b, k), a whole sequence in order; booleans of the same shape. A token chooses an expert at most once, so
    that the order of its own choices does not matter.
    """
    xp = array_module(chosen)
    taken = xp.cumsum(membership(chosen, experts), 0)
    return xp.take_along_axis(taken, chosen, -1) <= most


def take_rows(x: Array, index: Array, scale: Array | None = None) -> Array:
    """y_i = x[index_i], zero where index_i is -1; times scale_i, if it is given.

    x (m, h), index (n,), scale (n,), y (n, h). The adjoint, for an index without repetitions, takes by its inverse.
    """
    xp = array_module(x)
    if not len(x):
        return xp.zeros((len(index), x.shape[1]), x.dtype)
    y = x[index]
    y[index < 0] = 0
    if scale is not None:
        y *= scale[:, None]
    return y


def combine(gates: Array, choices: Array) -> Array:
    """y = sum_j gates_j choices_j, in the order of j. gates (t, k), choices (t, k, h), y (t, h)."""
    y = gates[:, :1] * choices[:, 0]
    for j in range(1, gates.shape[1]):
        y += gates[:, j : j + 1] * choices[:, j]
    return y


def combine_backward_gates(dy: Array, choices: Array) -> Array:
    """dgates_j = dy . choices_j, (t, k)."""
    return array_module(dy).stack([(dy * choices[:, j]).sum(-1) for j in range(choices.shape[1])], -1)
