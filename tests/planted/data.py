"""Data parallelism, buckets and microbatches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcmp.comm.mesh import DATA, Mesh
from hpcmp.kernels import CPU
from hpcmp.layers.loss import VocabularyParallelCrossEntropy
from hpcmp.parallel.buckets import Bucket, Buckets
from hpcmp.parallel.pipeline import Pipeline
from hpcmp.training.engine import Engine
from tests.planted.machinery import Patch, after, planted
from tests.training import test_engine


@planted("dp=2")
def gradient_not_summed_over_replicas(patch: Patch) -> None:
    """Every replica steps with the gradient of its own samples."""
    patch.setattr(Bucket, "start", lambda self: setattr(self, "pending", []))


@planted("dp=2")
def gradient_averaged_over_replicas(patch: Patch) -> None:
    """The sum over replicas is divided by their number, though the loss is already a mean over the global batch."""

    def divide(self: Bucket) -> None:
        self.grad /= self.copies.size

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
    right = Buckets.initialise
    patch.setattr(Buckets, "initialise", lambda self, seed: right(self, seed + self.mesh.rank))


@planted("dp=2,tp=2,sp=0", raises=RuntimeError, heads=4, kv_heads=4, ffn=12, vocabulary=20)
def replicas_summed_over_the_wrong_ranks(patch: Patch) -> None:
    """Gradients are summed over the ranks of tp instead of the replicas."""
    right = Mesh.__getitem__
    patch.setattr(Mesh, "__getitem__", lambda self, axes: right(self, "tp" if axes == DATA else axes))


@planted("dp=2", bucket_mb=1e-4)
def bucket_summed_before_its_last_gradient(patch: Patch) -> None:
    """A bucket is summed when the first of its modules is done; what the others add stays a rank's own."""

    def done(self: Buckets, module: Any, final: bool) -> None:
        for bucket in self._held.get(id(module), ()):
            if final and bucket.pending is None:
                bucket.start()
                bucket.finish()
                bucket.pending = []

    patch.setattr(Buckets, "done", done)


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
