"""Errors planted in the library, one at a time: ``verify``, or a check that is named, must notice every one.

Each is the kind of slip that parallel training codes have had. Most are harmless to the serial model, so that it is the
layout that computes wrong numbers. The table of docs/verification.md lists them all.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp import collectives, partition, random, wgrad
from hpcmp.collectives import Collective
from hpcmp.comm.base import Pending
from hpcmp.comm.mesh import Mesh
from hpcmp.comm.mpi import MpiCommunicator
from hpcmp.kernels import CPU
from hpcmp.layers import attention, dropout
from hpcmp.layers.attention import CausalAttention, Heads, Rope
from hpcmp.layers.embedding import LearnedPositions, VocabularyParallelEmbedding
from hpcmp.layers.linear import ColumnParallelLinear, RowParallelLinear
from hpcmp.layers.loss import VocabularyParallelCrossEntropy
from hpcmp.layers.norm import LayerNorm
from hpcmp.layers.parallel import ModelParallel
from hpcmp.models import transformer
from hpcmp.module import Module, Recompute
from hpcmp.parallel.buckets import Bucket, Buckets
from hpcmp.parallel.pipeline import Pipeline
from hpcmp.parallel.schedules import SCHEDULES, Action
from hpcmp.training import engine
from hpcmp.training.config import Config
from hpcmp.training.engine import Engine
from hpcmp.training.verify import source_of, verify
from tests.layouts import small, spread
from tests.optim.test_adamw import assert_norms_and_biases_are_not_decayed
from tests.training import test_engine

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

LIMIT = 1e-10  # a right layout differs by a few 1e-15
DOCS = Path(__file__).resolve().parents[1] / "docs" / "verification.md"

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]


@dataclass(frozen=True)
class Planted:
    """An error: how it is planted, the configuration that shows it, and what notices: ``verify`` by its numbers, by
    raising ``raises`` on every rank, or the function ``check`` by an AssertionError."""

    name: str
    what: str
    plant: Plant
    layout: str = ""
    values: tuple[tuple[str, Any], ...] = ()
    raises: type[Exception] | None = None
    check: Callable[[], None] | None = None

    @property
    def config(self) -> Config:
        """What ``verify`` runs."""
        return spread(small(**dict(self.values)), self.layout)

    @property
    def ranks(self) -> int:
        """How many ranks that takes."""
        return 1 if self.check else self.config.layout.ranks


PLANTED: dict[str, Planted] = {}


def planted(
    layout: str = "", raises: type[Exception] | None = None, check: Callable[[], None] | None = None, **values: Any
) -> Callable[[Plant], Plant]:
    """Enter a function that plants an error in the table, under its name and with its docstring."""

    def enter(plant: Plant) -> Plant:
        name, what = plant.__name__, " ".join((plant.__doc__ or "").split())
        PLANTED[name] = Planted(name, what, plant, layout, tuple(values.items()), raises, check)
        return plant

    return enter


def after(patch: Patch, owner: type, method: str, then: Callable[..., Any]) -> None:
    """``owner.method`` as it is, then ``then`` with the same arguments."""
    right = getattr(owner, method)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = right(self, *args, **kwargs)
        then(self, *args, **kwargs)
        return result

    patch.setattr(owner, method, call)


class Wrong(Collective):
    """A collective of which the forward, or the adjoint, is another function of the local array."""

    layout = ""

    def __init__(self, right: Collective, forward: Any = None, adjoint: Any = None) -> None:
        super().__init__(right.comm, right.axis, right.total)
        self.right, self.does, self.adjoint = right, forward, adjoint

    def start(self, x: Any) -> Pending:
        return Pending(self.does(x)) if self.does else self.right.start(x)

    @property
    def T(self) -> Collective:
        return Wrong(self.right.T, self.adjoint) if self.adjoint else self.right.T


def same(x: Any) -> Any:
    return x


# Tensor and sequence parallelism


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


def not_shared(*names: str) -> Callable[..., None]:
    def break_it(self: Any, *_: Any, **__: Any) -> None:
        for name in names:
            getattr(self, name).shared = ()

    return break_it


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

    def forward(self: Any, x: Any) -> tuple[Any, Any]:
        weight = self.weight.data.reshape(-1, self.weight.data.shape[-1])
        return self.leave(CPU.matmul(x.reshape(*x.shape[: x.ndim - self.rank], -1), weight) + self.bias.data), x

    patch.setattr(RowParallelLinear, "forward", forward)


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


# Attention


@planted("tp=2,sp=0")
def key_value_heads_swapped(patch: Patch) -> None:
    """A rank's query heads read its key-value heads in the opposite order."""
    right = Heads.blocks

    def blocks(self: Heads) -> Any:
        found = right(self)
        return [(q, kv) for (q, _), (_, kv) in zip(found, found[::-1], strict=True)]

    patch.setattr(Heads, "blocks", blocks)


@planted("tp=2,sp=0")
def shared_key_value_gradient_not_summed(patch: Patch) -> None:
    """The gradient of a key-value head that two ranks read is that of a rank's own queries."""
    patch.setattr(Heads, "overlaps", False)


@planted("tp=2,sp=0")
def shared_key_value_gradient_summed_in_place(patch: Patch) -> None:
    """Shards that overlap are summed element by element, as if they were the same slab."""
    after(patch, Bucket, "__init__", lambda self, *_: setattr(self, "overlaps", False))


@planted("tp=2,sp=1", style="llama")
def rotary_positions_restart_on_every_shard(patch: Patch) -> None:
    """The angle of a position is counted from the beginning of the sequence shard that it came from."""
    right = transformer.block

    def turn(self: Any, x: Any, sign: int) -> Any:
        q, kv = x
        parts = [Rope._turn(self, (q[s], kv[s]), sign) for s in partition.split(len(q), self.shards)]
        return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))

    def block(a: Any, parallel: Any, name: str) -> Any:
        made: Any = right(a, parallel, name)
        rope = made.layers["attention"].layers["rope"]
        rope.shards = parallel.tp.size
        rope._turn = functools.partial(turn, rope)
        return made

    patch.setattr(transformer, "block", block)


# Dropout and positions


def in_place(patch: Patch, kind: type, positions: Callable[[Any], slice]) -> None:
    """``kind.forward`` with other positions, a function of its input."""
    right = kind.forward  # type: ignore[attr-defined]

    def forward(self: Any, x: Any) -> Any:
        parallel = self.parallel
        self.parallel = SimpleNamespace(cursor=parallel.cursor, positions=lambda: positions(x))
        try:
            return right(self, x)
        finally:
            self.parallel = parallel

    patch.setattr(kind, "forward", forward)


@planted("tp=2,sp=1")
def learnt_positions_restart_on_every_shard(patch: Patch) -> None:
    """The first position of every sequence shard is position 0."""
    in_place(patch, LearnedPositions, lambda x: slice(0, len(x)))


@planted("tp=2,sp=1", dropout=0.1)
def dropout_restarts_on_every_shard(patch: Patch) -> None:
    """Every sequence shard draws the mask of the first positions."""
    in_place(patch, dropout.Dropout, lambda x: slice(0, len(x)))


@planted("dp=2", dropout=0.1)
def dropout_by_local_sample(patch: Patch) -> None:
    """The mask follows a sample's place in its microbatch, not in the global batch."""
    patch.setattr(dropout, "samples", lambda place, batch, xp: xp.arange(batch))


@planted("tp=2,sp=0", dropout=0.1)
def attention_dropout_by_local_head(patch: Patch) -> None:
    """Every rank draws the masks of the first heads."""
    right = dropout.attention_mask

    def attention_mask(rate: float, name: str, cursor: Any, place: Any, shape: Any, heads: slice, like: Any) -> Any:
        return right(rate, name, cursor, place, shape, slice(0, heads.stop - heads.start), like)

    patch.setattr(attention, "attention_mask", attention_mask)


def elsewhere(right: Any, cursor_of: Callable[[Any], Any]) -> Callable[..., Any]:
    """A method that runs at the place of another step."""

    def call(self: Any, *args: Any) -> Any:
        cursor = cursor_of(self)
        place = cursor.place
        cursor.place = type(place)(place.step + 1, place.samples, place.length, place.training)
        try:
            return right(self, *args)
        finally:
            cursor.place = place

    return call


@planted("recompute=full", dropout=0.1)
def recomputed_with_other_masks(patch: Patch) -> None:
    """The forward that runs again in the backward draws the masks of another step."""
    moved = elsewhere(Recompute.backward, lambda self: self.inner.layers["attention"].layers["core"].cursor)
    patch.setattr(Recompute, "backward", moved)


@planted("pp=2,schedule=1f1b", dropout=0.1)
def dropout_by_local_layer(patch: Patch) -> None:
    """Every stage counts its layers from 0 in the keys of their masks."""
    right = transformer.build
    local = iter(())

    def build(*args: Any, **kwargs: Any) -> Any:
        nonlocal local
        local = itertools.count()  # type: ignore[assignment]
        return right(*args, **kwargs)

    block = transformer.block
    patch.setattr(engine, "build", build)
    patch.setattr(transformer, "block", lambda a, parallel, name: block(a, parallel, f"blocks/{next(local)}"))


@planted(check=test_engine.assert_every_step_has_masks_of_its_own)
def same_masks_in_every_step(patch: Patch) -> None:
    """The step is not part of the key of a dropout mask."""
    right = random.key
    patch.setattr(random, "key", lambda seed, *names: right(seed, *(n for n in names if isinstance(n, str))))


@planted(check=test_engine.assert_the_gradient_is_that_of_the_mean_loss)
def attention_backward_with_other_masks(patch: Patch) -> None:
    """The backward of attention draws masks of its own."""
    right = CausalAttention.backward

    def backward(self: Any, dy: Any, saved: Any, wgrad: Any) -> Any:
        *kept, place = saved
        other = type(place)(place.step + 1, place.samples, place.length, place.training)
        return right(self, dy, (*kept, other), wgrad)

    patch.setattr(CausalAttention, "backward", backward)


# Data parallelism, buckets and microbatches


@planted("dp=2")
def gradient_not_summed_over_replicas(patch: Patch) -> None:
    """Every replica steps with the gradient of its own samples."""
    patch.setattr(Bucket, "start", lambda self: setattr(self, "pending", []))


@planted("dp=2")
def gradient_averaged_over_replicas(patch: Patch) -> None:
    """The sum over replicas is divided by their number, though the loss is already a mean over the global batch."""

    def divide(self: Bucket) -> None:
        self.grad /= self.comm.size

    after(patch, Bucket, "finish", divide)


def scaled(patch: Patch, scale: Callable[[Any, float], float]) -> None:
    """``Pipeline.step`` with another scale, a function of the microbatches and the right one."""
    right = Pipeline.step
    patch.setattr(Pipeline, "step", lambda self, m, s, *done: right(self, m, scale(m, s), *done))


@planted("dp=2")
def loss_divided_by_the_local_batch(patch: Patch) -> None:
    """The gradient is summed over replicas, but each took the mean over its own samples."""
    scaled(patch, lambda microbatches, _: 1 / sum(len(m.place.samples) * m.place.length for m in microbatches))


@planted("dp=2", batch=5)
def remainder_of_the_batch_dropped(patch: Patch) -> None:
    """Every replica takes batch // dp samples."""

    def share(self: Engine) -> slice:
        dp = self.mesh["dp"]
        each = self.config.train.batch // dp.size
        return slice(dp.rank * each, (dp.rank + 1) * each)

    patch.setattr(Engine, "share", property(share))


@planted("dp=2")
def replicas_start_with_other_weights(patch: Patch) -> None:
    """The rank is part of the seed of the initial values."""
    right = Module.initialise
    rank = [0]
    after(patch, Buckets, "__init__", lambda self, module, mesh, **_: rank.__setitem__(0, mesh.rank))
    patch.setattr(Module, "initialise", lambda self, seed, *args: right(self, seed + rank[0], *args))


@planted("dp=2,tp=2,sp=0", heads=4, kv_heads=4, ffn=12, vocabulary=20)
def replicas_summed_over_the_wrong_ranks(patch: Patch) -> None:
    """Gradients are summed over the ranks of tp instead of the replicas."""
    right = Mesh.__getitem__
    patch.setattr(Mesh, "__getitem__", lambda self, axes: right(self, "tp" if axes == ("dp",) else axes))


@planted("dp=2", bucket_mb=1e-4)
def bucket_summed_before_its_last_gradient(patch: Patch) -> None:
    """A bucket is summed when the first of its modules is done; what the others add stays a rank's own."""

    def ready(self: Buckets, module: Any) -> None:
        for bucket in self._held.get(id(module), ()):
            if bucket.pending is None:
                bucket.start()
                bucket.finish()
                bucket.pending = []

    patch.setattr(Buckets, "ready", ready)


@planted("micro=2")
def microbatch_gradient_overwritten(patch: Patch) -> None:
    """A weight gradient replaces that of the microbatch before instead of being added to it."""

    def add_outer(grad: Any, x: Any, dy: Any) -> None:
        grad[...] = CPU.rows(x).T @ CPU.rows(dy)

    patch.setattr(CPU, "add_outer", add_outer)


@planted("pp=2,schedule=1f1b,micro=2", batch=5)
def microbatch_means_averaged(patch: Patch) -> None:
    """The loss is the mean of the microbatches' means, though the last microbatch is smaller."""
    right, step = VocabularyParallelCrossEntropy.backward, Pipeline.step
    count = [1, 0]

    def noted(self: Pipeline, microbatches: Any, *args: Any) -> Any:
        count[:] = len(microbatches), sum(len(m.place.samples) for m in microbatches)
        return step(self, microbatches, *args)

    patch.setattr(Pipeline, "step", noted)

    def backward(self: Any, dy: Any, saved: Any, wgrad: Any) -> Any:
        here = saved[1].shape[1]
        return right(self, dy * count[1] / (count[0] * here), saved, wgrad)

    patch.setattr(VocabularyParallelCrossEntropy, "backward", backward)


@planted(check=test_engine.assert_each_step_begins_with_no_gradient)
def gradient_kept_from_the_step_before(patch: Patch) -> None:
    """The gradient is not set to zero between steps."""

    def zero(self: Buckets) -> None:
        for bucket in self.buckets:
            bucket.missing = sum(p.uses for p in bucket.parameters)

    patch.setattr(Buckets, "zero", zero)


# Pipeline


def schedule(patch: Patch, name: str, change: Callable[[list[Action]], list[Action]]) -> None:
    right = SCHEDULES[name]
    patch.setitem(SCHEDULES, name, lambda *sizes: iter(change(list(right(*sizes)))))


@planted("pp=2,schedule=gpipe,micro=2", raises=KeyError)
def backward_before_forward(patch: Patch) -> None:
    """The schedule takes the first backward before the first forward. (`simulate` refuses it too.)"""
    schedule(patch, "gpipe", lambda actions: sorted(actions, key=lambda a: (a.kind != "B" or len(actions) < 3, 0)))


@planted("pp=2,schedule=gpipe,micro=2")
def backward_of_another_microbatch(patch: Patch) -> None:
    """The backward takes the activations of the newest microbatch instead of its own."""

    class Newest(Module):
        def __init__(self, stage: Module) -> None:
            self.stage, self.saved = stage, []  # type: ignore[var-annotated]

        def forward(self, x: Any) -> tuple[Any, None]:
            y, saved = self.stage.forward(x)
            self.saved.append(saved)
            return y, None

        def backward(self, dy: Any, saved: None, wgrad: Any) -> Any:
            return self.stage.backward(dy, self.saved.pop(), wgrad)

    after(patch, Pipeline, "__init__", lambda self, *_: setattr(self, "stage", Newest(self.stage)))


@planted("pp=2,schedule=1f1b,micro=2")
def last_microbatch_dropped(patch: Patch) -> None:
    """The schedule leaves the last microbatch out, where there are several."""
    schedule(patch, "1f1b", lambda actions: [a for a in actions if a.microbatch == 0 or a.microbatch < max(actions)[1]])


@planted("pp=2,schedule=gpipe,micro=3")
def microbatches_crossed_on_the_way(patch: Patch) -> None:
    """A message carries the tag of the other microbatch."""
    right = MpiCommunicator.send
    patch.setattr(MpiCommunicator, "send", lambda self, x, peer, tag=0: right(self, x, peer, tag ^ 2))


@planted("pp=2,schedule=zb-h1,micro=2")
def weight_gradients_skipped(patch: Patch) -> None:
    """The schedule leaves out the weight gradients of the first of several microbatches."""
    schedule(patch, "zb-h1", lambda actions: [a for a in actions if a != Action("W", 0) or len(actions) < 4])


@planted("pp=2,schedule=zb-h1,micro=2")
def weight_gradients_added_twice(patch: Patch) -> None:
    """The queue of weight gradients is not emptied, and run again, but for the last microbatch."""
    right = wgrad.Queue.flush

    def flush(self: wgrad.Queue, run: Any = wgrad.now) -> None:
        items = list(self.items)
        right(self, run)
        if run is wgrad.now:
            self.items = items
            right(self, run)

    patch.setattr(wgrad.Queue, "flush", flush)


@planted("pp=2,schedule=1f1b", tied=True)
def tied_gradient_not_summed_over_the_ends(patch: Patch) -> None:
    """The embedding and the head, on different stages, each keep their own gradient of the table that they share."""
    right = transformer._table

    def table(*args: Any) -> Any:
        made = right(*args)
        made.shared = ()
        return made

    patch.setattr(transformer, "_table", table)


@planted("pp=2,schedule=1f1b", raises=RuntimeError, layers=3)
def layer_on_two_stages(patch: Patch) -> None:
    """Every stage but the first begins one layer early."""

    def part(n: int, parts: int, i: int) -> slice:
        right = partition.part(n, parts, i)
        return slice(right.start - (i > 0), right.stop)

    patch.setattr(transformer, "partition", SimpleNamespace(part=part))


# The optimizer


def local_square(buckets: Buckets, owned: bool) -> float:
    grads = [p.grad[p.owned_local] if owned else p.grad for p in buckets.parameters]
    return sum(float(np.square(grad).sum()) for grad in grads)


@planted("tp=2,sp=0")
def clipped_by_the_local_norm(patch: Patch) -> None:
    """The norm is that of a rank's own shards."""
    patch.setattr(Buckets, "norm", lambda self: local_square(self, True) ** 0.5)


@planted("tp=2,sp=0")
def norm_counts_every_copy(patch: Patch) -> None:
    """What every rank of tp holds, norms and biases, is counted once a rank in the norm."""

    def norm(self: Buckets) -> float:
        return float(self.mesh["pp", "tp"].all_reduce(np.array([local_square(self, False)])).wait()[0] ** 0.5)

    patch.setattr(Buckets, "norm", norm)


@planted("tp=2,sp=0", raises=RuntimeError)
def copies_owned_by_every_rank(patch: Patch) -> None:
    """Every rank of tp says that it owns the norms and biases, which would be written once a rank, too."""
    right = ModelParallel.replicated

    def replicated(self: Any, *shape: int, **kwargs: Any) -> Any:
        made = right(self, *shape, **kwargs)
        made.owned = made.index
        return made

    patch.setattr(ModelParallel, "replicated", replicated)


@planted(check=assert_norms_and_biases_are_not_decayed)
def weight_decay_on_norms_and_biases(patch: Patch) -> None:
    """What is whole on every rank is decayed like a matrix."""
    right = ModelParallel.replicated

    def replicated(self: Any, *shape: int, initial: Any = None, decay: bool = True) -> Any:
        return right(self, *shape, initial=initial)

    patch.setattr(ModelParallel, "replicated", replicated)


def by_verify(found: Planted) -> Any:
    return pytest.param(found.name, marks=pytest.mark.mpi(min_size=max(2, found.ranks)))


@functools.cache
def control(config: Config) -> float:
    """How far the layout is from the serial model without an error; the same on every rank of the world."""
    from mpi4py import MPI

    return verify([config], MPI.COMM_WORLD, source_of(config))[0].worst


@pytest.mark.parametrize("name", [by_verify(p) for p in PLANTED.values() if not p.check])
def test_verify_notices(world: Intracomm, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = PLANTED[name]
    if world.size != max(2, error.ranks):
        pytest.skip(f"{max(2, error.ranks)} ranks show it")
    config = error.config
    assert control(config) <= 1e-12
    error.plant(monkeypatch)
    if error.raises:
        with pytest.raises(error.raises):
            verify([config], world, source_of(config))
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            assert verify([config], world, source_of(config))[0].worst > LIMIT


@pytest.mark.parametrize("name", [p.name for p in PLANTED.values() if p.check])
def test_the_named_check_notices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check = PLANTED[name].check
    assert check
    check()
    PLANTED[name].plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.mpi(min_size=2)
def test_backwards_in_another_order_are_no_error(world: Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as all stages agree: a schedule is free to choose, and ``verify`` to agree."""
    schedule(monkeypatch, "gpipe", lambda actions: sorted(actions, key=lambda a: (a.kind == "B", -a.microbatch)))
    config = spread(small(dropout=0.1), "pp=2,schedule=gpipe,micro=2")
    assert verify([config], world, source_of(config))[0].worst <= 1e-12


def rows() -> list[str]:
    """The rows of the two tables of docs/verification.md, but for what was measured."""
    lines = []
    for p in PLANTED.values():
        setting = "".join(f", {key} = {value}" for key, value in p.values)
        shown = p.check.__name__.removeprefix("assert_").replace("_", " ") if p.check else f"`{p.layout}`{setting}"
        lines.append(f"| {p.name.replace('_', ' ')} | {p.what} | {shown} |")
    return lines


def test_the_documentation_lists_every_error() -> None:
    text = DOCS.read_text().partition("## Planted errors")[2]
    told = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| error |")]
    assert [row for row in rows() if not any(line.startswith(row) for line in told)] == []
    assert sorted(line.split("|")[1].strip().replace(" ", "_") for line in told) == sorted(PLANTED)
