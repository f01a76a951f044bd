"""What a rank sends in a step is what the formula of its layout says: the rows of benchmarks/traffic.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.traffic import measure, rows

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


@pytest.mark.mpi(min_size=2)
def test_a_step_sends_what_its_formula_says(world: Intracomm) -> None:
    if world.size == 3:
        pytest.skip("the formulas are of even shares, which 3 ranks have not")
    for name, text, formula, model in rows(world.size):
        measured, expected = measure(model, text, formula, world)
        assert measured == expected, name
        assert sum(measured.values()) > 0


def test_alone_nothing_is_sent() -> None:
    for name, text, formula, model in rows(1):
        measured, _ = measure(model, text, formula, None)
        assert not measured, name
