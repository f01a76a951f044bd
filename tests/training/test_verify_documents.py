"""Documents kept apart in whole models: every layout gives the serial model's numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp import partition
from hpcmp.documents import beginnings
from hpcmp.training.verify import source_of
from tests.layouts import ODD, assert_serial, engine, small, spread

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

APART = ODD | {"layers": 2, "vocabulary": 67, "documents": "apart"}

#: Layouts by their number of ranks, with every kind of parallelism.
LAYOUTS = {
    1: ["micro=2,recompute=attention", "offload=both,micro=3", "recompute=full"],
    2: [
        "cp=2",
        "cp=2,ulysses=2,micro=2,recompute=attention",
        "tp=2,sp=1",
        "tp=2,sp=0,offload=both",
        "pp=2,schedule=zb-h1,micro=2",
        "dp=2,zero=3,recompute=full",
        "tp_y=2",
        "tp_z=2,micro=2",
    ],
    3: ["cp=3", "cp=3,ulysses=3", "tp=3,sp=1", "dp=3,micro=1,zero=1"],
    4: [
        "cp=4,recompute=full",
        "cp=4,ulysses=2,micro=3",
        "cp=2,tp=2,sp=1",
        "cp=2,pp=2,schedule=interleaved,virtual=1,micro=2",
        "cp=2,ulysses=2,pp=2,schedule=zb-v,micro=2",
        "dp=2,cp=2,zero=3,offload=both",
    ],
    8: [
        "dp=2,cp=2,tp=2,sp=1,zero=1",
        "cp=2,ulysses=2,pp=2,tp=2,sp=1,schedule=1f1b,micro=2",
        "cp=4,ulysses=2,tp=2,sp=1,recompute=attention",
    ],
}

LLAMA = {"style": "llama", "sequence": 5, "kv_heads": 1, "tied": False, "bias": True}
EXPERTS = LLAMA | {"experts": 4, "expert_ffn": 5, "capacity": 0.75}


@pytest.mark.mpi
@pytest.mark.timeout(180)
@pytest.mark.parametrize("values", [{}, LLAMA], ids=["gpt, 13 positions", "llama, 5 positions"])
def test_every_layout(world: Intracomm, values: dict[str, Any]) -> None:
    config = small(**(APART | values))
    assert_serial([spread(config, text) for text in LAYOUTS[world.size]], world)


@pytest.mark.mpi(min_size=2)
def test_experts(world: Intracomm) -> None:
    text = {2: "cp=2,ep=2,micro=3", 3: "dp=3,ep=3", 4: "dp=2,cp=2,ep=4"}.get(world.size, "dp=2,cp=2,tp=2,sp=1,ep=4")
    assert_serial([spread(small(**(APART | EXPERTS)), text)], world)


def test_a_sample_of_verify_has_documents_of_odd_lengths_that_lie_on_several_ranks() -> None:
    config = small(**APART)
    inputs, targets, _ = source_of(config)(0, slice(0, 7))
    np.testing.assert_array_equal(inputs[1:], targets[:-1])
    begins = beginnings(inputs, 66)
    lengths = [np.diff([*np.unique(row), 13]).tolist() for row in begins]
    assert all(len(each) > 1 for each in lengths)
    assert {1, 3, 7} <= {n for each in lengths for n in each[:-1]}
    for size in (2, 3, 4):  # queries whose document began in another rank's part
        whose = np.empty(13, int)
        for rank in range(size):
            whose[partition.zigzag(13, size, rank)] = rank
        assert (whose[begins] != whose).sum() > 13
    joined = source_of(small(**(APART | {"documents": "joined"})))(0, slice(0, 7))[0]
    assert (inputs == joined).mean() > 0.5  # apart from where documents end they are the same


def test_documents_apart_are_other_numbers_than_joined() -> None:
    """In a step and in an evaluation."""
    config = small(**(APART | {"dropout": 0.0}))
    batch = source_of(config)(0, slice(0, 7))
    found = []
    for documents in ("apart", "joined"):
        with engine(small(**(APART | {"dropout": 0.0, "documents": documents}))) as e:
            found += [e.evaluate(*batch, batch=7), e.step(0, *batch).loss]
    assert found[0] == pytest.approx(found[1], rel=1e-13) and found[2] == pytest.approx(found[3], rel=1e-13)
    assert abs(found[0] - found[2]) > 1e-6
