"""Errors of the kinds that are made, planted one at a time: the checks of the layers find each, on every rank at once.

A check that finds nothing here would find nothing in the layers either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hpcmp import collectives, kernels, random
from hpcmp.arrays import Array
from hpcmp.collectives import AllReduce, Copy, Split
from hpcmp.comm.base import Communicator, Pending
from hpcmp.comm.layouts import Layouts
from hpcmp.layers import dropout
from hpcmp.layers.attention import Rope
from hpcmp.layers.dropout import Dropout
from hpcmp.layers.embedding import VocabularyParallelEmbedding
from hpcmp.layers.heads import Heads
from hpcmp.layers.linear import RowParallelLinear
from hpcmp.layers.parallel import ModelParallel
from hpcmp.module import Module, Parameter, Recompute, Residual, Sequential

from . import test_activation, test_attention, test_dropout, test_embedding, test_linear, test_loss, test_norm
from .common import Case, place

Plant = Callable[[pytest.MonkeyPatch], None]

ATTENTION = Case(lambda p: test_attention.attention(p, 5, 1, rope=True))  # one key-value head, which every rank reads
NORM = test_norm.CASES["layer"]
MLP = test_activation.CASES["gelu mlp"]
ROW = test_linear.CASES["row with bias"]
BLOCK = test_dropout.CASES["block"]


# --- seen on one rank, by central differences --------------------------------------------------------------------


def kernel(name: str, wrong: Callable[..., Any]) -> Plant:
    """``wrong`` in place of a kernel; it is given the right one first."""
    right = getattr(kernels.CPU, name)
    return lambda patch: patch.setattr(kernels.CPU, name, lambda *args, **more: wrong(right, *args, **more))


def in_place(right: Callable[..., Array], x: Array) -> Array:
    x[...] = right(x)
    return x


def overwrite(right: Callable[..., None], grad: Array, x: Array, dy: Array) -> None:
    grad[...] = 0
    right(grad, x, dy)


def without_one_gradient(right: Callable[..., Any], *args: Any) -> tuple[Array, Array]:
    dq, dkv = right(*args)
    return dq, dkv * np.array([[0.0], [1.0]])


def ignoring_the_mask(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Dropout, "backward", lambda self, dy, saved, wgrad: dy)


def forgetting_the_skip(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Residual, "backward", Sequential.backward)


def recomputing_at_another_step(patch: pytest.MonkeyPatch) -> None:
    """As if the cursor had moved on before the second forward."""
    right = Recompute.backward

    def backward(self: Recompute, dy: Array, saved: Any, wgrad: Any) -> Any:
        dropouts = [m for m in vars(self.inner)["layers"].values() if isinstance(m, Dropout)]
        for layer in dropouts:
            layer.name += "'"
        dx = right(self, dy, saved, wgrad)
        for layer in dropouts:
            layer.name = layer.name[:-1]
        return dx

    patch.setattr(Recompute, "backward", backward)


def turning_the_same_way_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Rope, "backward", lambda self, dy, saved, wgrad: self._turn(dy, 1))


SERIAL: dict[str, tuple[Plant, Case]] = {
    "a wrong constant in gelu's backward": (kernel("gelu_backward", lambda right, dy, x: right(dy, 1.01 * x)), MLP),
    "a gradient of layer norm without its mean": (
        kernel("layer_norm_backward", lambda right, dy, x, w, mean, rstd, onto=None: rstd * dy * w),
        NORM,
    ),
    "a bias gradient twice": (
        kernel("layer_norm_backward_weight", lambda right, *args: (right(*args)[0], 2 * right(*args)[1])),
        NORM,
    ),
    "no gradient of the keys": (kernel("attention_backward", without_one_gradient), ATTENTION),
    "a weight gradient that overwrites": (kernel("add_outer", overwrite), MLP),
    "a forward in place": (kernel("gelu", in_place), test_activation.CASES["gelu"]),
    "a backward that changes dy": (
        kernel("gelu_backward", lambda right, dy, x: np.multiply(dy, right(np.ones_like(dy), x), out=dy)),
        test_activation.CASES["gelu"],
    ),
    "dropout whose backward ignores the mask": (ignoring_the_mask, BLOCK),
    "a residual whose backward forgets the skip": (forgetting_the_skip, MLP),
    "recomputing with another mask": (recomputing_at_another_step, test_dropout.CASES["recomputed"]),
    "rotary positions turned the same way back": (turning_the_same_way_back, ATTENTION),
}


@pytest.mark.parametrize("error", SERIAL)
def test_found_on_one_rank(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, case = SERIAL[error]
    case.check_serial()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        case.check_serial()


# --- seen on several ranks, against the serial run ---------------------------------------------------------------


def adjoint(operator: type[collectives.Collective], wrong: type[collectives.Collective]) -> Plant:
    return lambda patch: patch.setitem(collectives.ADJOINT, operator, wrong)


def off_by_one(patch: pytest.MonkeyPatch) -> None:
    right = Layouts.reduce_scatter

    def reduce_scatter(self: Layouts, x: Array, axis: int = 0) -> Pending:
        return right(self, np.roll(x, 1, axis), axis)

    patch.setattr(Layouts, "reduce_scatter", reduce_scatter)


def owned_by_all_readers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Heads, "owned", property(lambda self: self.key_values))


def overlap_not_told(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Heads, "overlaps", property(lambda self: False))


def no_sum_over_tp(patch: pytest.MonkeyPatch) -> None:
    """The classic: norms under sequence parallelism, each with the gradient of its own positions."""
    right = ModelParallel.replicated

    def replicated(self: ModelParallel, *shape: int, **settings: Any) -> Parameter:
        p = right(self, *shape, **settings)
        p.shared = ()
        return p

    patch.setattr(ModelParallel, "replicated", replicated)


def bias_before_the_sum(patch: pytest.MonkeyPatch) -> None:
    right = RowParallelLinear.forward

    def forward(self: RowParallelLinear, x: Array) -> tuple[Array, Array]:
        y, saved = right(self, x)
        assert self.bias is not None
        return y + (self.leave.comm.size - 1) * self.bias.data, saved

    patch.setattr(RowParallelLinear, "forward", forward)


def bias_gradient_of_all_positions(patch: pytest.MonkeyPatch) -> None:
    right = RowParallelLinear.backward_weight
    patch.setattr(RowParallelLinear, "backward_weight", lambda self, x, whole, dy: right(self, x, whole, whole))


def mask_by_local_position(patch: pytest.MonkeyPatch) -> None:
    right = dropout.DropoutMask
    patch.setattr(dropout, "DropoutMask", lambda rate, key, i, *others: right(rate, key, i - i.min(), *others))


def first_row_is_zero_everywhere(patch: pytest.MonkeyPatch) -> None:
    right = VocabularyParallelEmbedding.__init__

    def init(self: VocabularyParallelEmbedding, *args: Any) -> None:
        right(self, *args)
        self.first = 0

    patch.setattr(VocabularyParallelEmbedding, "__init__", init)


def local_maximum(patch: pytest.MonkeyPatch) -> None:
    """Each rank subtracts its own maximum before the sums are added up."""
    from hpcmp.comm.mpi import MpiCommunicator

    all_reduce = MpiCommunicator.all_reduce

    def wrong(self: Any, x: Array, op: Any = "sum", out: Array | None = None) -> Pending:
        return Pending(x) if op == "max" else all_reduce(self, x, op, out)

    patch.setattr(MpiCommunicator, "all_reduce", wrong)


def values_by_local_index(patch: pytest.MonkeyPatch) -> None:
    right = random.normal_slab

    def wrong(key: Any, shape: tuple[int, ...], index: tuple[slice, ...], xp: Any = np) -> Array:
        local = tuple(s.stop - s.start for s in index)
        return right(key, local, tuple(slice(0, n) for n in local), xp)

    patch.setattr(random, "normal_slab", wrong)


RANKED: dict[str, tuple[Plant, Case, bool]] = {  # the error, what it shows in, whether under sequence parallelism
    "entering without the sum in backward": (adjoint(Copy, Copy), MLP, False),
    "leaving with another sum in backward": (adjoint(AllReduce, AllReduce), MLP, False),
    "a gather whose adjoint does not add": (adjoint(collectives.AllGather, Split), MLP, True),
    "reduce-scatter off by one": (off_by_one, MLP, True),
    "a key-value head owned by all who read it": (owned_by_all_readers, ATTENTION, False),
    "overlapping shards without their sum": (overlap_not_told, ATTENTION, False),
    "a norm without its sum over tp": (no_sum_over_tp, NORM, True),
    "a bias added before the sum": (bias_before_the_sum, ROW, False),
    "a bias gradient of all positions on every rank": (bias_gradient_of_all_positions, ROW, True),
    "a mask by local position": (mask_by_local_position, BLOCK, True),
    "an embedding that starts at zero on every rank": (
        first_row_is_zero_everywhere,
        test_embedding.CASES["tied"],
        False,
    ),
    "a loss with each rank's own maximum": (local_maximum, test_loss.CASES["7"], False),
    "initial values by local index": (values_by_local_index, MLP, False),
}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("error", RANKED)
def test_found_on_every_rank(error: str, tp: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, case, sequence = RANKED[error]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        case.check_equal(place(13, tp, sequence=sequence))
    tp.all_reduce(np.zeros(1)).wait()  # every rank is here: none waits in the check


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("error", ["overlapping shards without their sum", "a norm without its sum over tp"])
def test_found_by_central_differences_too(error: str, tp: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, case, sequence = RANKED[error]
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="differ between ranks"):
        case.check_gradients(place(13, tp, sequence=sequence))


@pytest.mark.mpi(min_size=2)
def test_an_error_of_one_rank_alone_is_raised_on_all(tp: Communicator) -> None:
    class OneOff(Module):
        def forward(self, x: Array) -> tuple[Array, None]:
            return x, None

        def backward(self, dy: Array, saved: None, wgrad: Any) -> Array:
            return dy * (1 + (tp.rank == tp.size - 1))

    case = Case(lambda p: OneOff() if p.tp.size > 1 else Sequential(), layout="VV")
    with pytest.raises(AssertionError, match="input"):
        case.check_equal(place(13, tp, sequence=True))
    with pytest.raises(AssertionError, match="input"):
        case.check_gradients(place(13, tp, sequence=True))
