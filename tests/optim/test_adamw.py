"""AdamW against the formula written another way, and clipping on every layout."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hpcmp import random
from hpcmp.comm.mesh import Mesh
from hpcmp.module import Index, Module, Parameter
from hpcmp.optim.adamw import AdamW
from hpcmp.parallel.buckets import Buckets
from hpcmp.training.verify import short
from tests.layouts import engine, layouts, small

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

RATE, BETAS, EPSILON, DECAY = 0.01, (0.9, 0.99), 1e-8, 0.1


def expected(start: NDArray[Any], gradients: list[NDArray[Any]], decay: float, rate: float = RATE) -> NDArray[Any]:
    """The weights after a step with each gradient: the moments as weighted means of the gradients so far.

    m_t = (1 - b1) sum_i b1^(t-i) g_i / (1 - b1^t), v_t likewise of g^2
    w_t = (1 - rate decay) w_(t-1) - rate m_t / (sqrt(v_t) + epsilon)
    """
    w = start.copy()
    for t in range(1, len(gradients) + 1):
        means = []
        for beta, power in zip(BETAS, (1, 2), strict=True):
            weights = np.array([beta ** (t - i) for i in range(1, t + 1)])
            terms = np.array([g**power for g in gradients[:t]])
            means.append(np.tensordot(weights / weights.sum(), terms, 1))
        w = w * (1 - rate * decay) - rate * means[0] / (np.sqrt(means[1]) + EPSILON)
    return w


class Weights(Module):
    """Holds parameters."""

    def __init__(self, *held: Parameter) -> None:
        self.held = held


def optimizer(dtype: Any = np.float64, **settings: Any) -> tuple[AdamW, list[Parameter]]:
    """Two decayed parameters and one that is not, with weights from N(0, 1)."""
    parameters = [Parameter((3, 5)), Parameter((4,), decay=False), Parameter((2, 3))]
    buckets = Buckets(Weights(*parameters), Mesh(), dtype=dtype)
    for p in parameters:
        p.data[...] = np.random.default_rng(p.data.size).standard_normal(p.shape)
    usual: dict[str, Any] = {"betas": BETAS, "epsilon": EPSILON, "weight_decay": DECAY, "clip": None}
    return AdamW(buckets, **(usual | settings)), parameters


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-13), (np.float32, 1e-6)])
def test_formula(dtype: Any, tolerance: float) -> None:
    adamw, parameters = optimizer(dtype)
    draw = np.random.default_rng(0)
    starts = [p.data.astype(np.float64) for p in parameters]
    history: list[list[NDArray[Any]]] = [[] for _ in parameters]
    for step in range(5):
        for p, gradients in zip(parameters, history, strict=True):
            p.grad[...] = draw.standard_normal(p.shape)
            gradients.append(p.grad.astype(np.float64))
        norm = adamw.step(RATE)
        assert norm == pytest.approx(math.sqrt(sum(np.square(g[-1]).sum() for g in history)), rel=1e-14)
        assert adamw.steps == step + 1
    for p, start, gradients in zip(parameters, starts, history, strict=True):
        want = expected(start, gradients, DECAY if p.decay else 0.0)
        np.testing.assert_allclose(p.data, want, rtol=tolerance, atol=tolerance)
        assert p.data.dtype == dtype


def test_the_first_step_is_the_sign_of_the_gradient() -> None:
    """m / (sqrt(v) + epsilon) = g / (|g| + epsilon): the correction for the moments' start from zero."""
    adamw, (p, *_) = optimizer(weight_decay=0.0)
    start = p.data.copy()
    p.grad[...] = np.where(np.arange(15).reshape(3, 5) % 2, 1e-3, -1e3)
    adamw.step(RATE)
    np.testing.assert_allclose(p.data - start, -RATE * np.sign(p.grad), rtol=1e-4)


def test_no_decay_where_decay_is_false() -> None:
    adamw, (matrix, bias, _) = optimizer()
    before = matrix.data.copy(), bias.data.copy()
    adamw.step(RATE)  # with a gradient of zero, decay is all there is
    np.testing.assert_allclose(matrix.data, before[0] * (1 - RATE * DECAY), rtol=1e-15)
    np.testing.assert_array_equal(bias.data, before[1])


def assert_norms_and_biases_are_not_decayed() -> None:
    """Exactly the matrices are: linears, the key-value pair, embeddings."""
    for style in ("gpt", "llama"):
        with engine(small(style=style, bias=True)) as e:
            for bucket in e.buckets.buckets:
                for p in bucket.parameters:
                    *_, layer, kind = p.name.split("/")
                    assert bucket.decay == p.decay == (layer != "norm" and "bias" not in kind), p.name


def test_norms_and_biases_are_not_decayed() -> None:
    assert_norms_and_biases_are_not_decayed()


@pytest.mark.parametrize("clip", [None, 1e9, 0.25])
def test_clip(clip: float | None) -> None:
    """A norm above ``clip`` is scaled to it; otherwise the gradient is as it was. The norm returned is the one before.

    (epsilon is as large as the gradient, since Adam alone does not see its scale.)
    """
    adamw, parameters = optimizer(clip=clip, epsilon=1.0, weight_decay=0.0)
    starts = [p.data.copy() for p in parameters]
    for p in parameters:
        p.grad[...] = np.random.default_rng(1).standard_normal(p.shape)
    before = [p.grad.copy() for p in parameters]
    norm = math.sqrt(sum(np.square(p.grad).sum() for p in parameters))
    assert adamw.step(RATE) == pytest.approx(norm, rel=1e-14)
    scale = 0.25 / norm if clip == 0.25 else 1.0
    for p, start, g in zip(parameters, starts, before, strict=True):
        g = g * scale
        np.testing.assert_allclose(p.data, start - RATE * g / (np.abs(g) + 1.0), rtol=1e-13)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_changes_nothing(bad: float) -> None:
    adamw, parameters = optimizer(clip=1.0)
    parameters[1].grad[2] = bad
    before = [p.data.copy() for p in parameters]
    assert not math.isfinite(adamw.step(RATE))
    assert adamw.steps == 0
    for p, data in zip(parameters, before, strict=True):
        np.testing.assert_array_equal(p.data, data)
    assert not any(array.any() for _, _, array in adamw.state())
    parameters[1].grad[2] = 1.0
    assert adamw.step(RATE) == 1.0 and adamw.steps == 1


def test_state_is_a_view_of_each_moment_of_each_parameter() -> None:
    adamw, parameters = optimizer()
    for p in parameters:
        p.grad[...] = p.data
    adamw.step(RATE)
    state = {(kind, id(piece.parameter)): array for kind, piece, array in adamw.state()}
    assert len(state) == 2 * len(parameters)
    for p in parameters:
        np.testing.assert_allclose(state["m", id(p)], (1 - BETAS[0]) * p.grad.reshape(-1), rtol=1e-13)
        np.testing.assert_allclose(state["v", id(p)], (1 - BETAS[1]) * p.grad.reshape(-1) ** 2, rtol=1e-13)
    state["m", id(parameters[0])][...] = 7  # what loading a checkpoint does
    assert any((states["m"].host() == 7).any() for states in adamw.states)


@pytest.mark.mpi
@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_every_layout_takes_the_same_clipped_steps(world: Intracomm, style: str) -> None:
    """Gradients by global index; the norm is the whole model's, whichever shards a rank holds."""

    def gradient(p: Parameter, step: int, index: Index) -> Any:
        return random.normal_slab(random.key(step, p.name), p.shape, index)

    def whole(p: Parameter) -> Index:
        return tuple(slice(0, n) for n in p.shape)

    values: dict[str, Any] = {"style": style, "clip": 0.5, "betas": BETAS, "epsilon": EPSILON, "weight_decay": DECAY}
    with engine(small(**values)) as serial:
        wanted = {}
        squares = [sum(np.square(gradient(p, t, whole(p))).sum() for p in serial.buckets.parameters) for t in range(2)]
        scales = [0.5 / math.sqrt(square) for square in squares]
        for p in serial.buckets.parameters:
            gradients = [scales[t] * gradient(p, t, whole(p)) for t in range(2)]
            wanted[p.name] = expected(p.data, gradients, DECAY if p.decay else 0.0)
    for config in layouts(small(**values), world.size):
        with engine(config, world) as e:
            for t in range(2):
                for p in e.buckets.parameters:
                    p.grad[...] = gradient(p, t, p.index)
                assert e.optimizer.step(RATE) == pytest.approx(math.sqrt(squares[t]), rel=1e-13)
            for p in e.buckets.parameters:
                np.testing.assert_allclose(
                    p.data, wanted[p.name][p.index], rtol=1e-11, atol=1e-13, err_msg=f"{p.name} {short(config.layout)}"
                )


@pytest.mark.mpi
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_on_one_rank_stops_the_step_on_all(world: Intracomm, bad: float) -> None:
    for config in layouts(small(), world.size):
        with engine(config, world) as e:
            before = [bucket.data.copy() for bucket in e.buckets.buckets]
            owners = [
                bool(world.bcast(any(p.grad[p.owned_local].size for p in e.buckets.parameters), r))
                for r in range(world.size)
            ]
            if world.rank == max(r for r, owns in enumerate(owners) if owns):
                p = next(p for p in e.buckets.parameters if p.grad[p.owned_local].size)
                p.grad[p.owned_local].flat[0] = bad
            e.buckets.finish()
            norms = world.allgather(e.optimizer.step(RATE))
            assert not any(math.isfinite(norm) for norm in norms), short(config.layout)
            assert e.optimizer.steps == 0
            for bucket, data in zip(e.buckets.buckets, before, strict=True):
                np.testing.assert_array_equal(bucket.data, data)
