"""Random models of odd sizes on random layouts, over every key of a layout, each against the serial model in float64.

Those that run are drawn with a fixed seed, so that every rank draws the same; a case's name is all there is of it.
HPCMP_TEST_LAYOUTS=500 runs 500 of them instead of 40. Hypothesis draws more, of which only the configuration is made.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmp.comm.mesh import Mesh
from hpcmp.errors import InputError
from hpcmp.parallel.schedules import SCHEDULES, make_schedule
from hpcmp.training.layout import short
from tests.layouts import SMALL, assert_serial, small, spread

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

COUNT = int(os.environ.get("HPCMP_TEST_LAYOUTS", 40))
LIMIT = 1e-10  # measured in a thousand: 1e-12
RANKS = 1, 2, 3, 4, 4, 8, 8, 8  # the more, the more there is to go wrong

Case = tuple[int, str, dict[str, Any]]  # ranks, layout, model
Choose = Callable[[Sequence[Any]], Any]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def model(choose: Choose) -> dict[str, Any]:
    """Values of ``tests.layouts.small``: sizes from 1 up, in which nothing need divide anything."""
    kv_heads = choose(range(1, 4))
    values = {
        "style": choose(["gpt", "llama"]),
        "layers": choose(range(1, 6)),
        "hidden": choose(range(3, 13)),
        "kv_heads": kv_heads,
        "heads": kv_heads * choose(range(1, 4)),
        "head_size": choose([2, 4]),
        "ffn": choose(range(1, 14)),
        "vocabulary": choose(range(2, 24)),
        "sequence": choose(range(1, 14)),
        "batch": choose(range(1, 8)),
        "dropout": choose([0.0, 0.1]),
        "tied": choose([True, False]),
        "bias": choose([True, False]),
        "clip": choose(["none", 0.5]),
        "bucket_mb": choose([1e-4, 1e-3, 4.0]),
        "name": choose(["adamw", "adamw", "adamw", "sgd", "lamb", "muon"]),
    }
    if choose([False, True]):
        experts = choose(range(1, 7))
        values |= {
            "experts": experts,
            "experts_every": choose(range(1, values["layers"] + 1)),
            "experts_per_token": choose(range(1, min(3, experts) + 1)),
            "expert_ffn": choose(range(1, 6)),
            "shared_experts": choose([0, 1]),
            "router": choose(["softmax", "sigmoid"]),
            "capacity": choose(["none", 0.5, 1.0]),
        }
    return values


def layout(choose: Choose, model: dict[str, Any]) -> dict[str, Any]:
    """The axes are a factorisation of the ranks, the other keys anything that may fit them."""
    left = choose(RANKS)
    made: dict[str, Any] = {}
    axes = list(Mesh.axes)
    while axes:
        axis = axes.pop(choose(range(len(axes))))
        made[axis] = choose(divisors(left)) if axes else left
        left //= made[axis]
    data = made["dp"] * made["cp"] * made["tp_z"]
    made |= {"ulysses": choose(divisors(made["cp"])), "sp": choose([0, 1])}
    if "experts" in model:
        made["ep"] = choose(divisors(data))
    made["schedule"] = choose(list(SCHEDULES))
    made["virtual"] = choose([1, 2, 3]) if made["schedule"] == "interleaved" else 1
    if choose([False, True]):
        stages = made["pp"] * make_schedule(made["schedule"], made["virtual"]).chunks
        ends = [0, *sorted(choose(range(model["layers"] + 1)) for _ in range(stages - 1)), model["layers"]]
        made["stages"] = "+".join(str(b - a) for a, b in zip(ends, ends[1:], strict=False))
    if zero := choose([0, 0, 1, 2, 3]):
        made |= {"zero": zero, "zero_group": choose(divisors(data))}
    made["recompute"] = choose(["none", "none", "full", "attention", "activations"])
    made["recompute_every"] = choose([1, 2])
    made["offload"] = choose(["none", "none", "activations", "optimizer", "both"])
    made["micro"] = choose(range(1, model["batch"] + 1))
    return made


def case(choose: Choose) -> Case:
    values = model(choose)
    made = layout(choose, values)
    ranks = math.prod(made[axis] for axis in Mesh.axes)
    return ranks, ",".join(f"{key}={value}" for key, value in made.items()), values


def drawn(count: int) -> Iterator[Case]:
    """Cases that the configuration takes, the same in every process; every second one keeps documents apart."""
    rng = random.Random(0)
    while count:
        ranks, text, values = case(rng.choice)
        with suppress(InputError):
            spread(small(**values), text)
            yield ranks, text, values | {"documents": ("joined", "apart")[count % 2]}
            count -= 1


def name(case: Case) -> str:
    """The layout, and what the model is but for what all have."""
    _, text, model = case
    return f"{text}:" + ",".join(f"{key}={value}" for key, value in model.items() if value != SMALL.get(key))


CASES = [pytest.param(c, marks=pytest.mark.mpi(size=c[0]), id=name(c)) for c in drawn(COUNT)]


@pytest.mark.parametrize("case", CASES)
def test_a_random_layout(world: Intracomm, case: Case) -> None:
    _, text, values = case
    assert_serial([spread(small(**values), text)], world, LIMIT)


@settings(max_examples=100, derandomize=True, database=None, deadline=None)
@given(st.data())
def test_any_layout_is_taken_or_refused_in_a_line_and_its_short_form_is_the_layout(data: st.DataObject) -> None:
    _, text, values = case(lambda options: data.draw(st.sampled_from(options)))
    try:
        config = spread(small(**values), text)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert spread(small(**values), short(config.layout)).layout == config.layout
