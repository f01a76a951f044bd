"""Every optimizer: its formula on whole parameters, and the same step on every layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.comm.mesh import Mesh
from hpcmp.kernels import update
from hpcmp.module import Module, Parameter
from hpcmp.optim.make import make_optimizer
from hpcmp.parallel.buckets import Buckets
from hpcmp.training.verify import source_of, verify
from tests.layouts import small, spread

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

SETTINGS: dict[str, Any] = {"betas": (0.9, 0.95), "epsilon": 1e-8, "momentum": 0.8, "weight_decay": 0.1, "clip": None}


class Weights(Module):
    """A matrix, a stack of two, what is no matrix, and what does not decay."""

    def __init__(self) -> None:
        self.matrix = Parameter((4, 3, 2), matrix=(0, 1))
        self.stack = Parameter((2, 3, 5), matrix=(1, 1))
        self.table = Parameter((5, 2))
        self.bias = Parameter((3,), decay=False)


def stepped(name: str, steps: int = 3) -> list[tuple[Parameter, np.ndarray, list[np.ndarray]]]:
    """(parameter after some steps of a rate of 0.1, weights at the start, the gradients)."""
    module, draw = Weights(), np.random.default_rng(5)
    buckets = Buckets(module, Mesh(), dtype=np.float64)
    found = []
    for p in module.parameters():
        p.data[...] = draw.normal(size=p.shape)
        found.append((p, p.data.copy(), [draw.normal(size=p.shape) for _ in range(steps)]))
    optimizer = make_optimizer(name, buckets, **SETTINGS)
    for step in range(steps):
        for p, _, gradients in found:
            p.grad[...] = gradients[step]
        optimizer.step(0.1)
    return found


def adam(gradients: list[np.ndarray]) -> np.ndarray:
    """Adam's direction after some gradients."""
    m, v = (np.zeros_like(gradients[0]) for _ in range(2))
    for step, g in enumerate(gradients, 1):
        direction = update.adam_update(g, m, v, step=step, betas=(0.9, 0.95), epsilon=1e-8, grad_scale=1.0)
    return direction


def test_sgd() -> None:
    for p, w, gradients in stepped("sgd"):
        m = np.zeros_like(w)
        for g in gradients:
            m = 0.8 * m + g
            w = w - 0.1 * (m + (0.1 * w if p.decay else 0))
        np.testing.assert_allclose(p.data, w, rtol=1e-12)


def test_lamb_steps_as_long_as_each_matrix_is() -> None:
    for p, w, gradients in stepped("lamb"):
        for step in range(1, len(gradients) + 1):
            u = adam(gradients[:step]) + (0.1 * w if p.decay else 0)
            axes = tuple(range(1, w.ndim)) if p.matrix and p.matrix[0] else None
            length = [np.sqrt((x**2).sum(axes, keepdims=True)) for x in (w, u)]
            w = w - 0.1 * (length[0] / length[1] if p.decay else 1) * u
        np.testing.assert_allclose(p.data, w, rtol=1e-12)


def test_muon_makes_each_matrix_orthogonal_and_leaves_the_rest_to_adam() -> None:
    for p, w, gradients in stepped("muon"):
        m = np.zeros_like(w)
        for step, g in enumerate(gradients, 1):
            m = 0.8 * m + g
            if p.matrix is None:
                direction = adam(gradients[:step])
            else:
                shape = (-1, 4, 6) if p.matrix[0] == 0 else (-1, 3, 5)
                ahead = (g + 0.8 * m).reshape(shape)
                scale = 0.2 * max(shape) ** 0.5
                direction = np.stack([scale * update.orthogonalise(x) for x in ahead]).reshape(w.shape)
            w = w - 0.1 * (direction + (0.1 * w if p.decay else 0))
        np.testing.assert_allclose(p.data, w, rtol=1e-10)


LAYOUTS = {
    1: ["recompute=full"],
    2: ["tp=2,sp=1", "dp=2", "dp=2,zero=1", "dp=2,zero=2", "dp=2,zero=3", "pp=2,micro=2", "cp=2", "tp_y=2"],
    3: ["tp=3,sp=0", "dp=3,zero=1", "dp=3,zero=3", "pp=3,schedule=zb-h1,micro=2"],
    4: ["dp=2,tp=2,zero=1", "dp=4,zero=3,zero_group=2", "pp=2,tp=2,sp=1", "tp=2,tp_z=2", "cp=2,dp=2,zero=2"],
    8: ["dp=2,pp=2,tp=2,zero=2", "tp=2,tp_y=2,tp_z=2", "dp=2,cp=2,tp=2,zero=1", "dp=8,zero=3", "tp=8"],
}


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["sgd", "lamb", "muon"])
def test_the_layout_changes_nothing(name: str, world: Intracomm) -> None:
    base = small(name=name, style="llama", dropout=0.1, learning_rate=0.01)
    configs = [spread(base, text, world.size) for text in LAYOUTS[world.size]]
    for report in verify(configs, world, source_of(base)):
        assert report.worst < 1e-10, report


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["adamw", "lamb", "muon"])
def test_experts_step_as_in_the_serial_model(name: str, world: Intracomm) -> None:
    texts = {
        1: [""],
        2: ["ep=2", "ep=2,zero=1"],
        3: ["ep=3"],
        4: ["ep=2,tp=2", "ep=2,zero=3", "ep=4"],
        8: ["ep=4,tp=2"],
    }
    base = small(name=name, experts=5, expert_ffn=7, learning_rate=0.01)
    configs = [spread(base, text or "pp=1", world.size) for text in texts[world.size]]
    for report in verify(configs, world, source_of(base)):
        assert report.worst < 1e-10, report
