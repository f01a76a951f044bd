"""Every error of ``tests/planted`` is noticed, by ``verify`` or by the check that it names."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.training.config import Config
from hpcmp.training.verify import source_of, verify
from tests.layouts import small, spread
from tests.planted.machinery import PLANTED, Planted, schedule, topics

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

LIMIT = 1e-10  # a right layout differs by a few 1e-15
DOCS = Path(__file__).resolve().parents[1] / "docs" / "verification.md"

topics()  # enters them in PLANTED


def on_its_ranks(error: Planted) -> Any:
    return pytest.param(error.name, marks=pytest.mark.mpi(size=error.ranks))


@functools.cache
def control(config: Config) -> float:
    """How far the layout is from the serial model without an error; the same on every rank of the world."""
    from mpi4py import MPI

    return verify([config], MPI.COMM_WORLD, source_of(config))[0].worst


@pytest.mark.parametrize("name", [on_its_ranks(p) for p in PLANTED.values() if not p.check])
def test_verify_notices(world: Intracomm, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = PLANTED[name]
    config = error.config
    assert control(config) <= 1e-12
    error.plant(monkeypatch)
    if error.raises:
        with pytest.raises(error.raises):
            verify([config], world, source_of(config))
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            assert verify([config], world, source_of(config))[0].worst > LIMIT


@pytest.mark.parametrize("name", [on_its_ranks(p) if p.ranks else p.name for p in PLANTED.values() if p.check])
def test_the_named_check_notices(name: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    error = PLANTED[name]
    world = [request.getfixturevalue("world")] if error.ranks else []
    assert error.check
    error.check(*world)
    error.plant(monkeypatch)
    with pytest.raises(AssertionError), np.errstate(over="ignore", invalid="ignore"):
        error.check(*world)


@pytest.mark.mpi(size=2)
def test_backwards_in_another_order_are_no_error(world: Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as all stages agree: a schedule is free to choose, and ``verify`` to agree."""
    schedule(monkeypatch, "gpipe", lambda actions: sorted(actions, key=lambda a: (a.kind == "B", -a.microbatch)))
    config = spread(small(dropout=0.1), "pp=2,schedule=gpipe,micro=2")
    assert verify([config], world, source_of(config))[0].worst <= 1e-12


def test_the_documentation_lists_every_error() -> None:
    """In the tables that ``mpirun -n 8 python -m tests.planted --write`` puts there."""
    text = DOCS.read_text().partition("## Planted errors")[2]
    told = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| error |")]
    assert [p.row for p in PLANTED.values() if not any(line.startswith(p.row) for line in told)] == []
    assert sorted(line.split("|")[1].strip().replace(" ", "_") for line in told) == sorted(PLANTED)
