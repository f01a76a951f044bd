"""3-D tensor parallelism."""

from __future__ import annotations

from typing import Any

from hpcmp.kernels import reference
from hpcmp.layers.dropout import Dropout
from hpcmp.layers.linear import ColumnParallelLinear, RowParallelLinear
from hpcmp.layers.norm import LayerNorm
from hpcmp.layers.parallel import ModelParallel
from hpcmp.training.engine import Engine
from tests.planted.machinery import Patch, Wrong, after, planted, same


@planted("tp_y=2")
def column_parallel_output_not_summed_over_y(patch: Patch) -> None:
    """A column-parallel linear goes on with the summand of its own part of hidden."""

    def break_it(self: Any, *_: Any, **__: Any) -> None:
        self.contract = Wrong(self.contract, same)

    after(patch, ColumnParallelLinear, "__init__", break_it)


@planted("tp=2,tp_y=2,sp=0")
def row_parallel_input_gradient_not_summed_over_y(patch: Patch) -> None:
    """The gradient of a row-parallel linear's input comes from a rank's own columns of hidden alone."""

    def break_it(self: Any, *_: Any, **__: Any) -> None:
        self.expand = Wrong(self.expand, adjoint=same)

    after(patch, RowParallelLinear, "__init__", break_it)


@planted("tp=2,tp_y=2,sp=0", heads=4, kv_heads=4, ffn=12, vocabulary=20)
def y_sums_over_x(patch: Patch) -> None:
    """What the ranks along y should sum is summed along x."""

    def break_it(self: Any, *_: Any, **__: Any) -> None:
        self.contract, self.expand = type(self.contract)(self.tp), type(self.expand)(self.tp)

    after(patch, ModelParallel, "__init__", break_it)


@planted("tp_y=2")
def norm_statistics_of_the_local_columns(patch: Patch) -> None:
    """A norm takes mean and variance over a rank's own part of hidden, forward and backward."""

    def break_it(self: Any, *_: Any, **__: Any) -> None:
        self.means = {"means": reference._means}

    after(patch, LayerNorm, "__init__", break_it)


@planted("tp_y=2")
def norm_gradient_by_the_local_columns(patch: Patch) -> None:
    """Forward it is right, but the backward takes its two means over a rank's own part of hidden."""
    right = LayerNorm.backward

    def backward(self: Any, *args: Any) -> Any:
        means, self.means = self.means, {}
        try:
            return right(self, *args)
        finally:
            self.means = means

    patch.setattr(LayerNorm, "backward", backward)


@planted("tp_y=2")
def column_bias_added_by_every_rank_of_y(patch: Patch) -> None:
    """A column-parallel bias is added before the sum over y. (It starts at zero: the second step shows it.)"""
    right = ColumnParallelLinear.forward

    def forward(self: Any, x: Any) -> tuple[Any, Any]:
        y, saved = right(self, x)
        more = [(self.contract.comm.size - 1) * bias.data for bias in self.biases.values()]
        if isinstance(y, tuple):
            return tuple(a + b for a, b in zip(y, more, strict=True)), saved
        return y + more[0], saved

    patch.setattr(ColumnParallelLinear, "forward", forward)


@planted("tp=2,tp_y=2,sp=0", heads=4, kv_heads=4, ffn=12)
def x_and_y_swapped_in_the_row_weight(patch: Patch) -> None:
    """A row-parallel weight shares its rows over y and its columns over x: of the same shape where x and y are equal,
    and tiling the whole."""

    def break_it(self: Any, parallel: Any, shape: tuple[int, ...], features: int, *, axis: int = 0, **_: Any) -> None:
        swapped = list(self.weight.index)
        swapped[axis], swapped[-1] = parallel.tp_y.part(shape[axis]), parallel.tp.part(features)
        self.weight.index = self.weight.owned = tuple(swapped)

    after(patch, RowParallelLinear, "__init__", break_it)


@planted("tp_y=2", dropout=0.1)
def dropout_by_local_column(patch: Patch) -> None:
    """The mask of a rank's part of hidden is that of the first columns."""

    def break_it(self: Any, *_: Any, **__: Any) -> None:
        self.columns = slice(0, self.columns.stop - self.columns.start)

    after(patch, Dropout, "__init__", break_it)


@planted("tp_y=2", raises=RuntimeError)
def copies_owned_by_every_rank_of_y(patch: Patch) -> None:
    """Every rank of y says that it owns the column-parallel biases, which are whole on all of them."""
    patch.setattr(ModelParallel, "_owned", lambda self, index, hidden: index)


@planted("tp_z=2")
def ranks_of_z_take_the_same_samples(patch: Patch) -> None:
    """The batch is shared over the replicas, but not over z."""
    patch.setattr(Engine, "share", property(lambda self: self.mesh["dp"].part(self.config.train.batch)))
