"""Context parallelism in whole models: every layout of a sequence over ranks gives the serial model's numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.training.config import Config
from hpcmp.training.verify import source_of, verify
from tests.layouts import ODD, engine, small, spread
from tests.training.test_verify import LIMIT, assert_serial

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

#: Layouts by their number of ranks: rings, exchanged heads, both, and each with every other kind of parallelism.
LAYOUTS = {
    2: ["cp=2", "cp=2,ulysses=2", "cp=2,recompute=attention"],
    3: ["cp=3", "cp=3,ulysses=3,micro=2"],
    4: [
        "cp=4",
        "cp=4,ulysses=2",
        "cp=4,ulysses=4,recompute=full",
        "cp=2,tp=2,sp=1",
        "cp=2,ulysses=2,tp=2,sp=1",
        "cp=2,tp=2,sp=0",
        "cp=2,pp=2,schedule=1f1b,micro=2",
        "cp=2,ulysses=2,pp=2,schedule=zb-h1,micro=2",
        "dp=2,cp=2",
        "cp=2,tp_y=2",
        "cp=2,ulysses=2,tp_z=2",
        "cp=4,ulysses=2,zero=3",
    ],
    8: [
        "cp=8,ulysses=2",
        "cp=4,ulysses=2,tp=2,sp=1",
        "dp=2,cp=2,tp=2,sp=1",
        "cp=2,ulysses=2,pp=2,tp=2,sp=1,schedule=1f1b,micro=2",
        "dp=2,cp=2,pp=2,schedule=zb-h1,micro=2",
    ],
}

CASES: dict[str, dict[str, Any]] = {
    "gpt, 13 positions, 6 heads of 3": ODD | {"style": "gpt", "layers": 2, "vocabulary": 67},
    "llama, 5 positions, 6 heads of 1": ODD
    | {"style": "llama", "layers": 2, "vocabulary": 67, "sequence": 5, "kv_heads": 1, "tied": False, "bias": True},
    "llama, 2 positions, 2 heads of 1": ODD
    | {"style": "llama", "layers": 2, "vocabulary": 67, "sequence": 2, "heads": 2, "kv_heads": 1},
}


def of(config: Config, world: Intracomm) -> list[Config]:
    """``config`` in each of the layouts of all ranks."""
    return [spread(config, text) for text in LAYOUTS.get(world.size, [])]


@pytest.mark.mpi(min_size=2)
@pytest.mark.timeout(180)
@pytest.mark.parametrize("case", CASES)
def test_every_layout(world: Intracomm, case: str) -> None:
    """With dropout, clipping and sequences that no ring divides, or that are shorter than it."""
    assert_serial(of(small(**CASES[case]), world), world)


@pytest.mark.mpi(min_size=2)
@pytest.mark.timeout(180)
def test_lengths_that_change_and_targets_that_are_ignored(world: Intracomm) -> None:
    """Of 4, 3, 2 and 1 positions, one step after the other; every third target is ignored."""

    def source(step: int, share: slice) -> Any:
        inputs, targets, samples = source_of(config)(step, share)
        there = np.arange(5)[:, None] + samples
        return inputs[: 4 - step], np.where(there % 3, targets, -1)[: 4 - step], samples

    config = small(dropout=0.1)
    for report in verify(of(config, world)[:3], world, source, steps=4):
        assert report.worst <= LIMIT, report.layout


@pytest.mark.mpi(min_size=2)
def test_the_loss_of_an_evaluation(world: Intracomm) -> None:
    config = small(sequence=13)
    inputs, targets, samples = source_of(config)(0, slice(0, 6))
    with engine(config) as serial:
        expected = serial.evaluate(inputs, targets, samples, 6)
    for text in (f"cp={world.size}", f"cp={world.size},ulysses={world.size}"):
        with engine(spread(config, text), world) as e:
            found = e.evaluate(inputs, targets, samples, 6)
        assert abs(found - expected) <= LIMIT * expected
