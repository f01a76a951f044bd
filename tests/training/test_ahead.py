"""Steps queued ahead of their results (``train.ahead``) against steps taken one by one: the same, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp import kernels
from hpcmp.cursor import Place
from hpcmp.errors import HpcmpError, InputError
from hpcmp.kernels import update
from hpcmp.training import ahead as queue
from hpcmp.training import metrics
from hpcmp.training.config import load_config
from hpcmp.training.outcome import Result
from hpcmp.training.phases import Phases
from hpcmp.training.trainer import Trainer
from hpcmp.training.verify import source_of
from tests.layouts import engine, small, spread

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

LAMB, MUON = "optimizer.name=lamb", "optimizer.name=muon"
#: By the number of ranks: layouts, of which every kind is there on 4, with every optimizer.
LAYOUTS = {
    1: [f"layout.zero=0 {LAMB}", f"layout.zero=3 {MUON}", "layout.offload=both optimizer.name=sgd"],
    2: [
        f"layout.tp=2 {MUON}",
        f"layout.pp=2 {LAMB}",
        f"layout.zero=1 {MUON}",
        f"layout.zero=2 layout.offload=optimizer {LAMB}",
        "layout.zero=3",
    ],
    3: ["layout.pp=3 layout.schedule=zb-h1", f"layout.zero=2 {MUON}"],
    4: [
        f"layout.tp=2 layout.pp=2 {MUON}",
        "layout.tp=2 layout.zero=1",
        f"layout.pp=2 layout.zero=3 {LAMB}",
        "layout.cp=2",
    ],
}
TIMES = {"seconds", "tokens_per_second", "share_of_peak", "save_seconds", "held_up_seconds", "phases", "slow", "time"}
TOLD = ("run.log_seconds=0", "run.evaluate_every=2", "checkpoint.every=3", "train.replica_check=4")

Taken = dict[str, Any]
Watch = Callable[[Trainer], None]


def take(toml: Path, world: Intracomm, ahead: int, *overrides: str, watch: Watch | None = None) -> Taken:
    """All there is to see of a run whose steps are queued ``ahead``; ``watch(trainer)`` before it, and after each."""
    folder = toml.parent / f"ahead {ahead}"
    given = [f"run.directory={folder}", f"train.ahead={ahead}", *(o for text in overrides for o in text.split())]
    results, error = [], ""
    with Trainer(load_config(toml, given), world) as t:
        if watch:
            watch(t)
        try:
            results = [_told(t, result, watch) for result in t]
            if t.saving.last is None or t.saving.last[0] != t.step:
                t.save()
        except HpcmpError as caught:
            error = str(caught).replace(str(folder), "")
        arrays = [b.master.copy() for b in t.engine.buckets.buckets]
        arrays += [array.copy() for _, _, array in t.engine.optimizer.state()]
        seen = {"results": results, "error": error, "arrays": arrays, "step": t.step, "path": t.metrics.path}
        seen["scale"] = t.engine.loss_scale.state()
        return seen | {"steps": t.engine.optimizer.steps, "samples": t.inputs.sampler.samples}


def _told(trainer: Trainer, result: Any, watch: Watch | None) -> Any:
    if watch:
        watch(trainer)
    return dataclasses.astuple(result)


def alike(one: Taken, other: Taken) -> None:
    for name in ("results", "error", "step", "steps", "samples", "scale"):
        assert repr(one[name]) == repr(other[name]), name  # of NaN, too
    assert one["arrays"] and all(np.array_equal(a, b) for a, b in zip(one["arrays"], other["arrays"], strict=True))


def records(taken: Taken) -> list[dict[str, Any]]:
    """The run's metrics, without times."""
    lines = map(json.loads, taken["path"].read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def plant(*steps: int, rank: int = 0) -> Watch:
    """In these steps ``rank``'s backward begins with a NaN, each time."""
    return lambda trainer: plant_in(trainer, np.nan, lambda place: place.step in steps, rank)


def plant_in(trainer: Trainer, value: float, where: Callable[[Place], bool], rank: int | None = None) -> None:
    """At these places the backward of ``rank``, by default the last, begins with ``value``."""
    stage = trainer.engine.stages[-1]
    if trainer.mesh.rank != (trainer.mesh.size - 1 if rank is None else rank) or "backward" in vars(stage):
        return
    backward = stage.backward

    def bad(dy: Any, saved: Any, wgrad: Any) -> Any:
        if dy.size and where(trainer.engine.cursor.place):
            dy = dy.copy()
            dy.reshape(-1)[0] = value
        return backward(dy, saved, wgrad)

    stage.backward = bad  # type: ignore[method-assign]


@pytest.mark.mpi
def test_a_run_is_the_same_bit_for_bit(world: Intracomm, toml: Path) -> None:
    for layout in LAYOUTS.get(world.size, LAYOUTS[2]):
        eager, ahead = (take(toml, world, n, layout, *TOLD, "checkpoint.resume=false") for n in (0, 1))
        alike(eager, ahead)
        assert len(ahead["results"]) == 6
        if world.rank == 0:
            assert records(ahead) == records(eager), layout
            assert len([line for line in records(ahead) if "checkpoint" in line]) == 2


@pytest.mark.mpi
@pytest.mark.fault(15)
def test_steps_that_are_no_good_are_skipped_alike(world: Intracomm, toml: Path) -> None:
    """The step behind each was queued, and is taken again; two in a row; one before an evaluation; the last one."""
    assert_bad_steps_are_skipped_alike(world, toml)


def assert_bad_steps_are_skipped_alike(world: Intracomm, toml: Path) -> None:
    bad = plant(0, 1, 3, 5, 8, rank=min(world.size, 5) - 1)
    for layout in ("train.nan_limit=2", *LAYOUTS.get(world.size, LAYOUTS[2])[1:3]):
        given = layout, "train.nan=skip train.steps=9", "run.log_seconds=0 run.evaluate_every=6 checkpoint.resume=false"
        eager, ahead = (take(toml, world, n, *given, watch=bad) for n in (0, 1))
        assert [i for i, result in enumerate(ahead["results"]) if result[-1]] == [0, 1, 3, 5, 8]
        assert ahead["steps"] == 4
        alike(eager, ahead)
        if world.rank == 0:
            assert records(ahead) == records(eager)


@pytest.mark.mpi
def test_an_update_after_a_step_that_is_no_good_is_noticed(
    world: Intracomm, toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: a factor that does not stay NaN, so that the step behind takes place, and once more."""

    def forgets(sums: Any, factor: Any, **settings: Any) -> None:
        factor[...] = 1
        update.clip_factor(sums, factor, **settings)

    monkeypatch.setattr(kernels.of(np.zeros(0)), "clip_factor", forgets)
    with pytest.raises(AssertionError):
        assert_bad_steps_are_skipped_alike(world, toml)


@pytest.mark.mpi
@pytest.mark.fault(15)
def test_a_step_that_is_no_good_ends_the_run_alike(world: Intracomm, toml: Path) -> None:
    eager, ahead = (take(toml, world, n, watch=plant(3)) for n in (0, 1))
    assert eager["error"].startswith("step 3: ") and "on rank 0 the gradient of" in eager["error"]
    assert eager["samples"] == 20 and ahead.pop("samples") == 25  # the step that was queued came to nothing
    alike(eager, ahead | {"samples": 20})


@pytest.mark.mpi
def test_a_stop_comes_as_soon_and_the_run_goes_on_alike(world: Intracomm, toml: Path) -> None:
    whole = take(toml, world, 0)

    def stop(trainer: Trainer) -> None:
        if trainer.step == 2 and world.rank == world.size - 1:
            trainer.request_stop("enough")

    if world.rank == 0:
        (toml.parent / "ahead 0").rename(toml.parent / "whole")
    world.Barrier()
    eager, ahead = (take(toml, world, n, watch=stop) for n in (0, 1))
    assert eager["step"] == 3 and [result[3] for result in ahead["results"]] == [False, False, True]
    alike(eager, ahead)
    rest = take(toml, world, 1)
    alike(whole, rest | {"results": [*whole["results"][:3], *rest["results"]]})


@pytest.mark.mpi
def test_a_save_in_the_loop_is_of_the_step_that_was_under_way(world: Intracomm, toml: Path) -> None:
    """It holds what the run would have had after that step, and counts its samples."""

    def save(trainer: Trainer) -> None:
        if trainer.step == 2 and not trainer.saving.last:
            trainer.save()
            assert trainer.saving.last and trainer.saving.last[0] == trainer.step == 3

    whole = take(toml, world, 1, watch=save)
    assert len(whole["results"]) == 6
    for folder in (toml.parent / "ahead 1" / "checkpoints").glob("step_00000006"):
        if world.rank == 0:
            folder.rename(toml.parent / "last")
    world.Barrier()
    rest = take(toml, world, 1)
    assert len(rest["results"]) == 3
    alike(whole, rest | {"results": whole["results"][:3] + rest["results"]})


@pytest.mark.mpi
def test_a_profiled_step_is_whole(world: Intracomm, toml: Path) -> None:
    """Each range of a step holds that step, and no part of another."""
    given = [f"run.directory={toml.parent / 'profiled'}", "train.ahead=1"]
    with Trainer(load_config(toml, given), world) as trainer:
        begin, began = trainer.engine.begin, []

        def told(*args: Any, **more: Any) -> Any:
            began.append(trainer.step)
            return begin(*args, **more)

        trainer.engine.begin = told  # type: ignore[method-assign]
        summary = trainer.train(profile=3)
    assert (summary["profile"]["first"], summary["profile"]["steps"]) == (2, 3)
    assert began == [0, 0, 2, 3, 4, 5]  # how many steps were done when each was begun


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "muon"])
def test_two_steps_of_an_engine_under_way(world: Intracomm, name: str) -> None:
    config = spread(small(name=name, loss_scale=8.0), f"dp={world.size}")
    source = source_of(config)
    found = []
    for ahead in (False, True):
        with engine(config, world) as e:
            if ahead:
                running = [e.begin(i, *source(i, e.share), stop=i == 1) for i in range(3)]
                results = [each.result() for each in running]
                assert running[0].result() is results[0]
            else:
                results = [e.step(i, *source(i, e.share), stop=i == 1) for i in range(3)]
            found.append((results, [b.master.copy() for b in e.buckets.buckets]))
    assert found[0][0] == found[1][0] and [result.stop for result in found[0][0]] == [False, True, False]
    assert all(np.array_equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_a_line_of_the_log_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the step that it was asked for is still under way, the next one is begun."""
    now = [0.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    progress = metrics.Progress(100, 8, 1.0, 1.0, 5.0, 0)
    asked = []
    for step in range(1, 9):
        now[0] += 2
        asked.append(progress.due(step))
        if step > 1 and asked[-2]:
            progress.tell(step - 1, 1.0, 1.0)
    assert asked == [False, False, True, False, False, False, True, False]  # from its line on, 5 seconds
    assert progress.due(100)


def test_the_time_of_a_step_is_that_from_result_to_result(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(queue, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Engine:
        phases = Phases()

        def begin(self, *_: Any, **__: Any) -> Any:
            now[0] += 1
            return SimpleNamespace(result=self.result)

        def result(self) -> Result:
            now[0] += 10
            return Result(1.0, 1.0, 0.1, False)

    ahead = queue.Ahead(Engine(), SimpleNamespace(next=lambda: (0, 0, 0)))  # type: ignore[arg-type]
    ahead.begin(0)
    ahead.begin(1)
    seconds = [ahead.result()[1]]
    ahead.begin(2)
    seconds += [ahead.result()[1], ahead.result()[1]]
    now[0] += 100  # of a save
    ahead.begin(3)
    seconds.append(ahead.result()[1])
    assert seconds == [12, 11, 10, 11] and not len(ahead)


def test_who_runs_ahead() -> None:
    """All do on a GPU; on the CPU nothing asks for it."""
    assert small().train.ahead == 0 and small(device="cuda", name="muon", dtype="float16").train.ahead == 1
    with pytest.raises(InputError, match=r"train.ahead: expected an integer in \[0, 1\], found 2"):
        small(ahead=2)
