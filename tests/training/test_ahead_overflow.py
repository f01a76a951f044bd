"""Steps of float16 that overflow, with the next queued behind them, against steps taken one by one: the same bits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.checkpoint import checkpoints, open_checkpoint
from hpcmp.training.outcome import Result, Running
from hpcmp.training.scaler import LossScale
from hpcmp.training.trainer import Trainer
from tests.training.test_ahead import LAYOUTS, Taken, alike, plant_in, records, take

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

FLOAT16 = "train.dtype=float16 train.steps=12 train.loss_scale_window=2 train.loss_scale=64"


def overflow(trainer: Trainer) -> None:
    """The backward of the last rank overflows where the loss scale is more than 8."""
    plant_in(trainer, np.inf, lambda place: place.weight * trainer.config.train.batch * place.length > 8.5)


@pytest.mark.mpi
def test_overflows_of_float16_are_skipped_alike(world: Intracomm, toml: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first step, several in a row, one that is saved, and one before an evaluation."""
    with caplog.at_level(logging.INFO, "hpcmp"):
        alone, many = "train.fp8=delayed optimizer.name=lamb", ["layout.tp=2 layout.pp=2"]
        layout = LAYOUTS.get(world.size, many)[-1] if world.size > 1 else alone
        skipped = assert_overflows_are_skipped_alike(world, toml, layout)
    told = [message for message in caplog.messages if "the loss scale is" in message]
    assert told == 2 * told[: len(skipped)] and len(told) == (world.rank == 0) * 2 * len(skipped)


def assert_overflows_are_skipped_alike(world: Intracomm, toml: Path, layout: str) -> list[int]:
    """Which steps were skipped, counted from 1."""
    given = layout, FLOAT16, "run.log_seconds=0 run.evaluate_every=6 checkpoint.every=4 checkpoint.resume=false"
    eager, ahead = (take(toml, world, n, *given, watch=overflow) for n in (0, 1))
    skipped = [i for i, result in enumerate(eager["results"], 1) if result[4]]
    assert skipped == [1, 2, 3, 6, 9, 12] and eager["steps"] == 6
    alike(eager, ahead)
    if world.rank == 0:
        assert records(ahead) == records(eager)
        assert saved(ahead) == saved(eager)
    return skipped


def saved(taken: Taken) -> list[Any]:
    """What the checkpoints of a run say of its optimizer, its loss scale and its data."""
    found = [open_checkpoint(path).state for path in checkpoints(taken["path"].parent / "checkpoints")]
    assert len(found) > 1
    return [[state[key] for key in ("optimizer_steps", "loss_scale", "sampler")] for state in found]


def stale(patch: pytest.MonkeyPatch) -> None:
    """A step counts as good once that is known: one that is begun before has the scale of the step before."""
    begun, judge = LossScale.begun, Running._judge

    def late(self: Running, sums: Any) -> Result:
        result = judge(self, sums)
        if result.sound:
            begun(self.engine.loss_scale)
        return result

    patch.setattr(LossScale, "begun", lambda self: self.now)
    patch.setattr(Running, "_judge", late)


def voided(patch: pytest.MonkeyPatch) -> None:
    """What was begun behind an overflow is not begun again."""
    patch.setattr(Result, "sound", property(lambda self: not self.trouble))


def not_taken_back(patch: pytest.MonkeyPatch) -> None:
    """A step behind an overflow has doubled the scale, which goes on from there."""
    overflowed = LossScale.overflowed

    def forgets(self: LossScale, before: Any) -> bool:
        now = self.now
        return overflowed(self, now if now.scale > before.scale else before)

    patch.setattr(LossScale, "overflowed", forgets)


@pytest.mark.mpi(size=2)
@pytest.mark.parametrize("fault", [stale, voided, not_taken_back])
def test_a_wrong_scale_is_noticed(world: Intracomm, toml: Path, monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        assert_overflows_are_skipped_alike(world, toml, "")
