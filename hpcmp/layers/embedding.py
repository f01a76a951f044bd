"""Token and position embeddings."""

from __future__ import annotations

from typing import Any

from .. import kernels
from ..arrays import Array
from ..module import Initial, Module, Parameter
from ..wgrad import WGrad
from .parallel import ModelParallel


class VocabularyParallelEmbedding(Module):
    """``leave(one_hot(tokens) E)`` with E (vocabulary, h) sharded over its rows, evenly or not, and hidden over tp_y.

    tokens (S, batch), integers -> y (s, batch, h): each rank looks up the rows it holds, the rest is zero, and leaving
    sums (exactly: every sum has one term that is not zero). Tokens get no gradient.
    """

    def __init__(self, parallel: ModelParallel, table: Parameter) -> None:
        self.leave = parallel.leave
        self.table = table
        self.first = table.index[0].start

    def forward(self, x: Array) -> tuple[Array, Array]:
        return self.leave(kernels.of(self.table.data).embedding(self.table.data, x, self.first)), x

    def backward(self, dy: Array, saved: Array, wgrad: WGrad) -> None:
        wgrad(self.backward_weight, saved, self.leave.T(dy))

    def backward_weight(self, tokens: Array, dy: Array) -> None:
        """dE[token] += dy for the rows that are here."""
        kernels.of(dy).embedding_backward_weight(self.table.grad, tokens, self.first, dy)


class LearnedPositions(Module):
    """y = x + P[position]. x (s, batch, h) may be a shard of the sequence; P (sequence, h) has every position, and of
    hidden this rank's share over tp_y. Where documents are kept apart, positions are counted from the beginning of
    each."""

    def __init__(self, parallel: ModelParallel, sequence: int, hidden: int, initial: Initial | None = None) -> None:
        self.parallel = parallel
        self.weight = parallel.replicated(sequence, hidden, hidden=1, initial=initial)

    def forward(self, x: Array) -> tuple[Array, Any]:
        documents, table = self.parallel.cursor.place.documents, self.weight.data
        if documents is not None:
            return x + kernels.of(table).embedding(table, documents.positions, 0), documents.positions
        here = self.parallel.positions()
        return x + table[here][:, None], here

    def backward(self, dy: Array, saved: Array, wgrad: WGrad) -> Array:
        wgrad(self.backward_weight, saved, dy)
        return dy

    def backward_weight(self, here: Array, dy: Array) -> None:
        """dP[position] += sum over the batch of dy: positions (s,) of all samples, none twice, or (s, batch)."""
        if here.ndim == 1:
            self.weight.grad[here] += dy.sum(1, dtype=self.weight.grad.dtype)
        else:
            kernels.of(dy).embedding_backward_weight(self.weight.grad, here, 0, dy)
