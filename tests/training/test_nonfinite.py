"""Fault: a loss or gradient that is no number on one rank: all ranks agree, and it is named."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.errors import HpcmpError
from hpcmp.training.config import load_config
from hpcmp.training.nonfinite import Found, describe
from hpcmp.training.trainer import Trainer
from tests.corpus import config, corpus

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


def found(**values: Any) -> Found:
    return Found(**{"weights": [], "loss": 1.0, "again": 1.0, "gradients": []} | values)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"weights": ["a", "b"], "loss": math.nan}, "a and 1 more not finite already on rank 2"),
        ({"gradients": ["x"]}, "on rank 2 the gradient of x"),
        (
            {"again": math.nan, "gradients": ["x", "y", "z"]},
            "the loss is not finite on rank 2; on rank 2 the gradient of x and 2 more",
        ),
        (
            {"loss": math.inf},
            "computed again, all is finite (the loss was not on rank 2): a passing fault, of memory or a device",
        ),
        ({}, "computed again, all is finite: a passing fault, of memory or a device"),
    ],
)
def test_what_is_said(bad: dict[str, Any], text: str) -> None:
    assert describe([found(), found(), found(**bad)]) == text


def test_the_first_in_the_order_of_the_backward_is_named_first() -> None:
    ranks = [(0, 9), (0, 9), (1, 3), (1, 5)]
    told = describe([found(gradients=[f"p{depth}"], depth=depth) for depth in ranks])
    assert told == "on rank 3 the gradient of p(1, 5), and then on ranks 0-2"


@pytest.fixture
def trainer(world: Intracomm, mpi_tmp_path: Path) -> Callable[..., Trainer]:
    if world.rank == 0:
        config(mpi_tmp_path, corpus(mpi_tmp_path))
    world.Barrier()
    return lambda *overrides: Trainer(load_config(mpi_tmp_path / "tiny.toml", list(overrides)), world)


def plant(trainer: Trainer, steps: set[int], times: int | None = None) -> None:
    """In ``steps`` the last stage's backward of this rank begins with a NaN; ``times``: so often in all."""
    stage, count = trainer.engine.stages[-1], [0]
    backward = stage.backward

    def planted(dy: Any, saved: Any, wgrad: Any) -> Any:
        if dy.size and trainer.step in steps and (times is None or count[0] < times):
            count[0] += 1
            dy = dy.copy()
            dy.reshape(-1)[0] = np.nan
        return backward(dy, saved, wgrad)

    stage.backward = planted  # type: ignore[method-assign]


def weights(trainer: Trainer) -> list[Any]:
    return [bucket.master.copy() for bucket in trainer.engine.buckets.buckets]


@pytest.mark.mpi
@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.fault(15)
def test_one_rank_stops_all_and_is_named(world: Intracomm, trainer: Callable[..., Trainer], zero: int) -> None:
    bad = min(world.size, 5) - 1  # the last one that has a sample
    with trainer(f"layout.zero={zero}") as t:
        if world.rank == bad:
            plant(t, {3})
        before: list[Any] = []
        with pytest.raises(HpcmpError, match="step 3: ") as error:
            for _ in t:
                before = weights(t)
        text = str(error.value)
        assert "gradient norm nan" in text and f"on rank {bad} the gradient of " in text
        assert text.endswith("there is no checkpoint yet")
        assert t.step == 3 and all(np.array_equal(a, b) for a, b in zip(before, weights(t), strict=True))


@pytest.mark.mpi
def test_a_fault_that_does_not_come_again_is_told_so(world: Intracomm, trainer: Callable[..., Trainer]) -> None:
    with trainer() as t:
        if world.rank == 0:
            plant(t, {2}, times=1)
        with pytest.raises(HpcmpError, match="computed again, all is finite: a passing fault"):
            for _ in t:
                pass


@pytest.mark.mpi
def test_a_weight_that_is_not_finite_is_named(world: Intracomm, trainer: Callable[..., Trainer]) -> None:
    with trainer() as t:
        next(iter(t))
        bucket = t.engine.buckets.buckets[0]
        if world.rank == 0:
            bucket.master[0] = np.inf
        with pytest.raises(HpcmpError, match=f"{bucket.parameters[0].name} not finite already on rank 0;"):
            next(iter(t))


@pytest.mark.mpi
@pytest.mark.fault(15)
def test_skipped_steps_change_nothing_and_the_run_goes_on(
    world: Intracomm, trainer: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    with trainer("train.nan=skip", "train.nan_limit=2", "run.log_seconds=0") as t:
        if world.rank == 0:
            plant(t, {1, 2, 4})
        seen = []
        with caplog.at_level(logging.WARNING, "hpcmp"):
            for _ in t:
                seen.append(weights(t)[0])
        changed = [not np.array_equal(a, b) for a, b in zip(seen, seen[1:], strict=False)]
        assert changed == [False, False, True, False, True]
        assert t.engine.optimizer.steps == 3
        path = t.metrics.path
    if world.rank == 0:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert [r["step"] for r in records if "skipped" in r] == [1, 2, 4]
        assert [r.message[:8] for r in caplog.records if "skipped" in r.message] == ["step 1: ", "step 2: ", "step 4: "]


@pytest.mark.mpi
@pytest.mark.fault(15)
def test_too_many_in_a_row_end_the_run(world: Intracomm, trainer: Callable[..., Trainer]) -> None:
    with trainer("train.nan=skip", "train.nan_limit=2") as t:
        plant(t, {2, 3, 4})
        with pytest.raises(HpcmpError, match="step 4: .*train.nan_limit = 2 steps in a row were skipped"):
            for _ in t:
                pass
