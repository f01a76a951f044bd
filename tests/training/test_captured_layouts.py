"""Captured blocks in every schedule, over stages and replicas: the bits of a run without graphs on the same layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from hpcmp.errors import InputError
from hpcmp.training.config import Config
from hpcmp.training.profile_ranges import Ranges, installed
from hpcmp.training.verify import source_of
from tests.kernels.emulation.backend import needs_gxx
from tests.layouts import small, spread
from tests.test_captured import captured_engine, differences, tiny

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = [needs_gxx, pytest.mark.timeout(300)]  # g++ builds what has changed

SCHEDULES = ["gpipe", "1f1b", "interleaved,virtual=2", "zb-h1", "zb-v", "dualpipe-v"]
STAGES = [(2, schedule) for schedule in SCHEDULES]
STAGES += [(3, "interleaved,virtual=2"), (3, "zb-h1"), (4, "1f1b"), (4, "zb-v")]


def deep(ranks: int, schedule: str) -> Config:
    """A block for each virtual stage, and one more."""
    two = schedule not in ("gpipe", "1f1b", "zb-h1")
    return tiny(layers=(2 if two else 1) * ranks + 1, batch=4, sequence=3, style="llama" if two else "gpt")


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "dualpipe-v"])
def test_schedules_on_one_rank(schedule: str) -> None:
    assert not differences(spread(deep(1, schedule), f"micro=1,schedule={schedule}"))


@pytest.mark.parametrize("schedule", [pytest.param(name, marks=pytest.mark.mpi(size=n)) for n, name in STAGES])
def test_schedules(world: Intracomm, schedule: str) -> None:
    config = spread(deep(world.size, schedule), f"pp={world.size},micro=1,schedule={schedule}")
    assert not differences(config, world)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("zero", [0, 1])
def test_replicas(world: Intracomm, zero: int) -> None:
    """Of uneven shares, their gradients in small buckets, each summed while the backward runs."""
    config = tiny(batch=2 * world.size + 1, microbatch=1, bucket_mb=2e-4, zero=zero, layers=2)
    assert not differences(spread(config, f"dp={world.size},micro=1,zero={zero}"), world)


@pytest.mark.mpi(size=4)
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_replicas_of_stages(world: Intracomm, schedule: str) -> None:
    config = tiny(batch=6, bucket_mb=2e-4, layers=3, dtype="bfloat16")
    text = f"dp=2,pp=2,micro=1,zero=1,schedule={schedule},recompute=activations"
    assert not differences(spread(config, text), world)


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ('train.device = "cpu"', {"device": "cpu"}),
    ("layout.tp_z = 2", {"tp_z": 2}),
    ("layout.cp = 4", {"cp": 4, "ulysses": 2}),
    ("layout.zero = 2", {"zero": 2}),
    ('layout.offload = "both"', {"offload": "both"}),
    ("model.experts = 4", {"experts": 4}),
    ('data.documents = "apart"', {"documents": "apart"}),
]


@pytest.mark.parametrize("what, values", REFUSED, ids=[what for what, _ in REFUSED])
def test_what_cannot_be_captured_is_refused(what: str, values: dict[str, Any]) -> None:
    with pytest.raises(InputError) as found:
        small(**{"cuda_graphs": True, "device": "cuda"} | values)
    assert str(found.value).startswith(f"train.cuda_graphs = true does not go with {what}, wh")


def test_what_can_be_captured_is_not_refused() -> None:
    taken = small(cuda_graphs=True, device="cuda", pp=2, schedule="zb-v", zero=1, offload="optimizer", recompute="full")
    assert taken.train.cuda_graphs and not small(device="cuda").train.cuda_graphs


def test_a_profile_sees_blocks_as_a_whole() -> None:
    """Of replayed and of captured ones alike, and what they compute stays."""
    config = tiny(schedule="zb-h1")
    source, found = source_of(config), []
    for ranges in (None, Ranges()):
        with captured_engine(config) as (e, device):
            losses = []
            for step in range(3):
                if ranges is None:
                    losses.append(e.step(step, *source(step, e.share)).loss)
                    continue
                with installed(e, ranges):
                    losses.append(e.step(step, *source(step, e.share)).loss)
            found.append(losses)
            assert device.graphs
        if ranges is not None:
            seen = {(each.name, each.about["direction"]) for each in ranges.kept if each.kind == "layer"}
            assert {(name, d) for name, d in seen if name.startswith("blocks")} == {
                (f"blocks/{i}", d) for i in range(2) for d in ("forward", "backward", "weight gradient")
            }
            assert ("head", "backward") in seen
    assert found[0] == found[1]
