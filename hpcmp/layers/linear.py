"""Linear, and its column- and row-parallel forms with the communication overlapped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import kernels
from ..arrays import Array
from ..comm.base import Pending
from ..module import Initial, Module, Parameter, constant
from ..wgrad import WGrad
from .parallel import ModelParallel
from .products import matrix as matrix


@dataclass(frozen=True)
class Output:
    """One output of a column-parallel linear: its feature ``shape``, of which ``axis`` is sharded.

    part and owned: the share of the axis that this rank holds and owns (an even share, by default); overlaps: whether
    the shares of different ranks overlap.
    """

    shape: tuple[int, ...]
    axis: int = 0
    part: slice | None = None
    owned: slice | None = None
    overlaps: bool = False


class ColumnParallelLinear(Module):
    """``Sequential(enter, Linear, contract)``, overlapped: Y = X W + b, each rank of tp making its columns of Y.

    x (s, batch, h): a shard of the sequence, or the whole, and of hidden this rank's share over tp_y (see
    ``ModelParallel``), so that a rank's product is one summand of Y; the first rank of tp_y adds b. Several outputs
    share one entry: the result is then a tuple, one array (S, batch, *shape) per output, each summed under the next
    one's product. Weights are (h, *shape), biases (*shape,). The backward re-enters x (keeping only the shard, or what
    ``products`` have made of the whole where it was not gathered), starts the exit of dX, and computes dW under it.
    """

    def __init__(
        self,
        parallel: ModelParallel,
        features: int,
        outputs: dict[str, Output],
        *,
        bias: bool = False,
        initial: Initial | None = None,
    ) -> None:
        self.enter, self.contract = parallel.enter, parallel.contract
        self.first = parallel.tp_y.rank == 0
        self.gathers = parallel.sequence and parallel.tp.size > 1
        self.weights: dict[str, Parameter] = {}
        self.biases: dict[str, Parameter] = {}
        for name, o in outputs.items():
            shard: dict[str, Any] = {"part": o.part, "owned": o.owned, "overlaps": o.overlaps}
            self.weights[name] = parallel.sharded(
                features, *o.shape, axis=1 + o.axis, hidden=0, initial=initial, matrix=(0, 1), **shard
            )
            if bias:
                self.biases[_bias(name)] = parallel.sharded(
                    *o.shape, axis=o.axis, initial=constant(0), decay=False, **shard
                )
        self.products = parallel.products.linear(list(self.weights.values()), 1)

    def forward(self, x: Array) -> tuple[Any, Any]:
        whole = self.enter(x)
        factor, kept = self.products.input(whole, self.gathers or self.input_stays)
        sums = []
        for name, weight in self.weights.items():
            bias = self.biases[_bias(name)].data.reshape(-1) if self.biases and self.first else None
            sums.append(self.contract.start(self.products.forward(factor, weight, 1, bias)))
        shapes = [(*whole.shape[:-1], *weight.data.shape[1:]) for weight in self.weights.values()]
        ys = [pending.wait().reshape(shape) for pending, shape in zip(sums, shapes, strict=True)]
        return ys[0] if len(ys) == 1 else tuple(ys), x if kept is whole else kept

    def backward(self, dy: Any, saved: Any, wgrad: WGrad) -> Array:
        whole = Pending(saved) if isinstance(saved, tuple) else self.enter.start(saved)  # under the GEMM of dX
        dys, weights = (dy,) if len(self.weights) == 1 else dy, list(self.weights.values())
        flat = [matrix(d, d.ndim - len(w.shape) + 1, keep=True) for d, w in zip(dys, weights, strict=True)]
        factors = [self.products.gradient(d, w, bool(self.biases)) for d, w in zip(flat, weights, strict=True)]
        dx = None
        for factor, weight in zip(factors, weights, strict=True):
            dx = self.products.backward(factor, weight, 1, onto=dx)
        leaving = self.enter.T.start(dx)
        wgrad(self.backward_weight, whole.wait(), factors)  # hides the exit of dX
        return leaving.wait()

    def backward_weight(self, x: Any, factors: list[Any]) -> None:
        """dW += X^T dY, db += sum dY. x: what was kept of the whole; factors: what ``products`` make of the dYs."""
        outer = self.products.outer(x)
        for factor, (name, weight) in zip(factors, self.weights.items(), strict=True):
            bias = self.biases[_bias(name)].grad.reshape(-1) if self.biases else None
            self.products.add_outer(weight, 1, outer, factor, bias)


class RowParallelLinear(Module):
    """``Sequential(expand, Linear, leave)``: Y = sum_r X_r W_r + b, each rank r of tp holding W's rows for its X_r.

    x (S, batch, *shape) with ``axis`` of ``shape`` sharded; W (*shape, h); y (s, batch, h): a shard of the sequence, or
    the whole, and of hidden this rank's share over tp_y. The first rank of tp adds b. The backward starts the sum of dX
    over tp_y, and computes dW under it.
    """

    def __init__(
        self,
        parallel: ModelParallel,
        shape: tuple[int, ...],
        features: int,
        *,
        axis: int = 0,
        bias: bool = False,
        initial: Initial | None = None,
    ) -> None:
        self.expand, self.leave = parallel.expand, parallel.leave
        self.first = parallel.tp.rank == 0
        self.weight = parallel.sharded(
            *shape, features, axis=axis, hidden=len(shape), initial=initial, matrix=(0, len(shape))
        )
        self.bias = parallel.replicated(features, hidden=0, initial=constant(0), decay=False) if bias else None
        self.rank = len(shape)
        self.products = parallel.products.linear([self.weight], self.rank)

    def forward(self, x: Array) -> tuple[Array, Any]:
        y, kept = self._product(x)
        return self.leave(y), kept

    def forward_onto(self, x: Array, onto: Array) -> tuple[Array, Any]:
        if self.leave.comm.size > 1:  # the sum of the ranks' products comes first
            y, kept = self._product(x)
            return kernels.of(onto).add(onto, self.leave(y)), kept
        return self._product(x, onto)

    def _product(self, x: Array, onto: Array | None = None) -> tuple[Array, Any]:
        flat = matrix(self.expand(x), x.ndim - self.rank, keep=True)
        factor, kept = self.products.input(flat, self.input_stays)
        bias = self.bias.data if self.bias is not None and self.first else None
        y = self.products.forward(factor, self.weight, self.rank, bias, onto)
        return y, x if kept is flat else kept

    def backward(self, dy: Array, saved: Any, wgrad: WGrad) -> Array:
        whole = self.leave.T(dy)
        own = None if self.bias is None or whole is dy else dy
        factor = self.products.gradient(whole, self.weight, self.bias is not None and own is None)
        del whole
        leaving = self.expand.T.start(self.products.backward(factor, self.weight, self.rank))
        wgrad(self.backward_weight, saved, factor, own)  # hides the sum of dX
        dx = leaving.wait()
        return dx.reshape(*dx.shape[:-1], *self.weight.local_shape[: self.rank])

    def backward_weight(self, x: Any, factor: Any, own: Array | None) -> None:
        """dW += X^T dY, of what was kept of X and what ``products`` make of the whole dY; db += the sum of this rank's
        own dY, given where that is another."""
        flat = x if isinstance(x, tuple) else matrix(x, x.ndim - self.rank, keep=True)
        bias = self.bias.grad if self.bias is not None else None
        self.products.add_outer(self.weight, self.rank, self.products.outer(flat), factor, bias, own)


class ParallelHead(Module):
    """Vocabulary-parallel logits: ``Sequential(enter, x -> x E^T, contract)``, E (vocabulary, h) sharded over its rows.

    x (s, batch, h) -> logits (S, batch, v), v this rank's rows, of which nothing is kept here: the loss writes over
    them. Of hidden, x and E have this rank's share over tp_y. E may be the embedding's own table (tied weights).
    """

    def __init__(self, parallel: ModelParallel, table: Parameter) -> None:
        self.enter, self.contract = parallel.enter, parallel.contract
        self.table = table

    def forward(self, x: Array) -> tuple[Array, Array]:
        return self.contract(kernels.of(x).matmul_transposed(self.enter(x), self.table.data)), x

    def backward(self, dy: Array, x: Array, wgrad: WGrad) -> Array:
        whole = self.enter.start(x)
        leaving = self.enter.T.start(kernels.of(x).matmul(dy, self.table.data))
        wgrad(self.backward_weight, whole.wait(), dy)
        return leaving.wait()

    def backward_weight(self, x: Array, dy: Array) -> None:
        """dE += dY^T X."""
        kernels.of(x).add_outer(self.table.grad, dy, x)


def _bias(weight: str) -> str:
    """The name of the bias that goes with a weight: ``bias`` with ``weight``, else ``query_bias`` with ``query``."""
    return "bias" if weight == "weight" else f"{weight}_bias"
