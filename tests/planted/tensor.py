"""Tensor and sequence parallelism."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from hpcmp import collectives, partition, random
from hpcmp.comm.base import Pending
from hpcmp.comm.mpi import MpiCommunicator
from hpcmp.kernels import CPU
from hpcmp.layers.embedding import LearnedPositions, VocabularyParallelEmbedding
from hpcmp.layers.linear import ColumnParallelLinear, RowParallelLinear
from hpcmp.layers.loss import VocabularyParallelCrossEntropy
from hpcmp.layers.norm import LayerNorm
from hpcmp.layers.parallel import ModelParallel
from hpcmp.training.engine import Engine
from tests.planted.machinery import Patch, Wrong, after, not_shared, planted, same


@planted("tp=2,sp=0")
def row_parallel_output_not_summed(patch: Patch) -> None:
    """Leaving a row-parallel linear, the all-reduce is missing."""
    after(patch, RowParallelLinear, "__init__", lambda self, *_, **__: setattr(self, "leave", Wrong(self.leave, same)))


@planted("tp=2,sp=0")
def column_parallel_input_gradient_not_summed(patch: Patch) -> None:
    """Entering a column-parallel linear, the backward of Copy is the identity."""

    def break_it(self: Any, *_: Any, **__: Any) -> None:
        self.enter = Wrong(self.enter, adjoint=same)

    after(patch, ColumnParallelLinear, "__init__", break_it)


@planted("tp=2,sp=1")
def reduce_scatter_does_not_sum(patch: Patch) -> None:
    """Reduce-scatter cuts a rank's own summand instead of the sum."""
    patch.setattr(collectives.ReduceScatter, "start", collectives.Split.start)


@planted("tp=2,sp=1", sequence=6)
def shards_gathered_in_another_order(patch: Patch) -> None:
    """All-gather joins the next rank's shard first."""
    right = collectives.AllGather.start

    def start(self: Any, x: Any) -> Pending:
        return Pending(np.roll(right(self, x).wait(), len(x), self.axis))

    patch.setattr(collectives.AllGather, "start", start)


@planted("tp=2,sp=1")
def norm_gradient_not_summed_over_tp(patch: Patch) -> None:
    """Under sequence parallelism a norm's weight gradient is that of a rank's own positions."""
    after(patch, LayerNorm, "__init__", not_shared("weight", "bias"))


@planted("tp=2,sp=1")
def row_bias_gradient_not_summed_over_tp(patch: Patch) -> None:
    """The same for the bias of a row-parallel linear."""
    after(patch, RowParallelLinear, "__init__", not_shared("bias"))


@planted("tp=2,sp=1")
def position_gradient_not_summed_over_tp(patch: Patch) -> None:
    """The same for the learnt positions."""
    after(patch, LearnedPositions, "__init__", not_shared("weight"))


@planted("tp=2,sp=0")
def row_bias_added_by_every_rank(patch: Patch) -> None:
    """A row-parallel bias is added before the sum over ranks. (It starts at zero: the second step shows it.)"""

    def product(self: Any, x: Any, onto: Any = None) -> Any:
        weight = self.weight.data.reshape(-1, self.weight.data.shape[-1])
        return CPU.matmul(x.reshape(*x.shape[: x.ndim - self.rank], -1), weight) + self.bias.data, x

    patch.setattr(RowParallelLinear, "_product", product)


@planted("tp=2,sp=0", raises=RuntimeError)
def shards_off_by_one(patch: Patch) -> None:
    """Every shard but the first begins, and ends, one row early."""
    right = ModelParallel.sharded

    def sharded(self: Any, *shape: int, axis: int, part: Any = None, **kwargs: Any) -> Any:
        part = part or self.tp.part(shape[axis])
        early = int(self.tp.rank > 0)
        return right(self, *shape, axis=axis, part=slice(part.start - early, part.stop - early), **kwargs)

    patch.setattr(ModelParallel, "sharded", sharded)


@planted("tp=2,sp=0", ffn=12)
def row_parallel_holds_the_next_ranks_rows(patch: Patch) -> None:
    """The shards of a row-parallel weight tile the whole, but belong to other columns of the input."""

    def break_it(
        self: Any, parallel: Any, shape: Any, features: int, *, axis: int = 0, initial: Any = None, **_: Any
    ) -> None:
        tp = parallel.tp
        part = partition.part(shape[axis], tp.size, (tp.rank + 1) % tp.size)
        self.weight = parallel.sharded(*shape, features, axis=axis, part=part, initial=initial)

    after(patch, RowParallelLinear, "__init__", break_it)


@planted("tp=2,sp=0")
def initial_values_by_local_index(patch: Patch) -> None:
    """Every rank draws its shard's initial values as if the shard were the first."""
    right = random.normal_slab

    def normal_slab(key: Any, shape: Any, index: Any, xp: Any = np) -> Any:
        return right(key, shape, tuple(slice(0, s.stop - s.start) for s in index), xp)

    patch.setattr(random, "normal_slab", normal_slab)


def first_off_by_one(self: Any, *_: Any, **__: Any) -> None:
    self.first += int(self.first > 0)


@planted("tp=2,sp=0")
def embedding_rows_off_by_one(patch: Patch) -> None:
    """The embedding counts its first row one too high, on every rank but the first."""
    after(patch, VocabularyParallelEmbedding, "__init__", first_off_by_one)


@planted("tp=2,sp=0")
def embedding_rows_that_are_elsewhere_not_zero(patch: Patch) -> None:
    """A token whose row lies on another rank looks up the nearest row that is here."""
    right = CPU.embedding

    def embedding(table: Any, ids: Any, first: int) -> Any:
        return right(table, ids.clip(first, first + len(table) - 1), first)

    patch.setattr(CPU, "embedding", embedding)


@planted("tp=2,sp=0")
def targets_off_by_one(patch: Patch) -> None:
    """The loss counts its first vocabulary column one too high, on every rank but the first."""
    after(patch, VocabularyParallelCrossEntropy, "__init__", first_off_by_one)


@planted("tp=2,sp=0")
def loss_maximum_not_reduced(patch: Patch) -> None:
    """Each rank subtracts the maximum of its own logits before it takes exponentials."""
    right = MpiCommunicator.all_reduce

    def all_reduce(self: Any, x: Any, op: Any = "sum", out: Any = None) -> Pending:
        return Pending(x) if op == "max" else right(self, x, op, out)

    patch.setattr(MpiCommunicator, "all_reduce", all_reduce)


@planted("tp=2,sp=0")
def loss_denominator_not_summed(patch: Patch) -> None:
    """The sum of exponentials is over a rank's own part of the vocabulary."""

    def break_it(self: Any, *_: Any) -> None:
        tp = self.tp

        def all_reduce(x: Any, op: Any = "sum") -> Pending:
            y = tp.all_reduce(x, op).wait()
            return Pending(y if op == "max" else np.stack([x[0], y[1]]))

        self.tp = SimpleNamespace(all_reduce=all_reduce)

    after(patch, VocabularyParallelCrossEntropy, "__init__", break_it)


@planted("tp=2,sp=0")
def loss_summed_over_tp(patch: Patch) -> None:
    """The loss that is reported is summed over the ranks of tp, which all have the same."""
    patch.setattr(Engine, "_mine", lambda self, total: float(total))
