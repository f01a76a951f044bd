"""Whole runs: the same on every layout, resumed on any, bit for bit on the same."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.checkpoint import CheckpointSaveError, open_checkpoint
from hpcmp.errors import HpcmpError, InputError
from hpcmp.training.config import load_config
from hpcmp.training.trainer import Trainer

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi

#: For each number of ranks, two layouts: one that a run begins on, and one that it goes on with.
PAIRS = {
    1: ("layout.dp=1", "layout.recompute=full"),
    2: ("layout.tp=2", "layout.dp=2"),
    3: ("layout.pp=3", "layout.tp=3"),
    4: ("layout.tp=2 layout.pp=2 layout.schedule=zb-h1", "layout.dp=2 layout.pp=2 layout.schedule=gpipe"),
    8: ("layout.tp=2 layout.pp=2 layout.dp=2", "layout.tp=8"),
}

#: The same with ZeRO: from each stage to others, and to none.
ZERO = {
    1: ("layout.zero=1", "layout.zero=3"),
    2: ("layout.zero=3", "layout.zero=1"),
    3: ("layout.zero=2", "layout.zero=3"),
    4: ("layout.tp=2 layout.zero=3", "layout.zero=2 layout.zero_group=2"),
    8: ("layout.pp=2 layout.zero=3 layout.zero_group=2", "layout.tp=2 layout.pp=2"),
}


def few(test: Callable[..., None]) -> Callable[..., None]:
    """What depends on the layout no further than that there are other ranks: on one alone, and on tp=2 pp=2."""
    return pytest.mark.mpi(size=1)(pytest.mark.mpi(size=4)(test))


both = pytest.mark.parametrize("pairs", [PAIRS, ZERO], ids=["plain", "zero"])


def run(toml: Path, world: Any, name: str, *overrides: str) -> dict[str, Any]:
    """Train in the run directory ``name``; the summary."""
    given = [f"run.directory={toml.parent / name}", *(o for text in overrides for o in text.split())]
    with Trainer(load_config(toml, given), world) as trainer:
        return trainer.train()


def tensors(toml: Path, name: str, step: int) -> dict[str, np.ndarray[Any, Any]]:
    checkpoint = open_checkpoint(toml.parent / name / "checkpoints" / f"step_{step:08d}")
    return {tensor: checkpoint.read(tensor) for tensor in checkpoint.tensors}


@both
def test_a_continued_run_equals_the_uninterrupted_one_bit_for_bit(
    world: Intracomm, toml: Path, pairs: dict[int, tuple[str, str]]
) -> None:
    layout = pairs[world.size][0]
    whole = run(toml, world, "whole", layout)
    run(toml, world, "parts", layout, "train.steps=3")
    parts = run(toml, world, "parts", layout)
    assert (whole["loss"], whole["held_out_loss"]) == (parts["loss"], parts["held_out_loss"])
    if world.rank == 0:
        a, b = tensors(toml, "whole", 6), tensors(toml, "parts", 6)
        assert a.keys() == b.keys() and len(a) > 90  # weights, two moments each, the tokenizer
        assert not [name for name in a if not np.array_equal(a[name], b[name])]


@both
def test_a_run_goes_on_on_another_layout(world: Intracomm, toml: Path, pairs: dict[int, tuple[str, str]]) -> None:
    first, second = pairs[world.size]
    double = "train.dtype=float64"
    run(toml, world, "moved", first, double, "train.steps=3")
    run(toml, world, "moved", second, double)
    if world.rank == 0:
        run(toml, None, "serial", double)
        a, b = tensors(toml, "moved", 6), tensors(toml, "serial", 6)
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name].astype(float), b[name].astype(float), 1e-9, 1e-12, err_msg=name)


@few
def test_metrics_have_a_line_a_step_and_a_resumed_run_none_twice(world: Intracomm, toml: Path) -> None:
    layout = PAIRS[world.size][0]
    run(toml, world, "metrics", layout, "train.steps=4", "checkpoint.every=2")
    if world.rank == 0:  # as if the job had died after step 2 was saved and step 4 was logged
        checkpoints = toml.parent / "metrics" / "checkpoints"
        for file in sorted((checkpoints / "step_00000004").iterdir()):
            file.unlink()
        (checkpoints / "step_00000004").rmdir()
    world.Barrier()
    summary = run(toml, world, "metrics", layout, "run.evaluate_every=3")
    lines = [json.loads(line) for line in Path(summary["metrics"]).read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(6))
    assert {"step", "tokens", "loss", "norm", "rate", "seconds", "tokens_per_second", "share_of_peak"} <= lines[
        0
    ].keys()
    assert [line["step"] for line in lines if "held_out" in line][-2:] == [2, 5]


@few
def test_a_stop_on_one_rank_stops_all_with_a_checkpoint(world: Intracomm, toml: Path) -> None:
    c = load_config(toml, [f"run.directory={toml.parent / 'stopped'}", *PAIRS[world.size][0].split()])
    with Trainer(c, world) as trainer:
        if world.rank == world.size - 1:
            trainer.request_stop("the last rank was told to")
        summary = trainer.train()
    assert (summary["step"], summary["finished"], summary["reason"]) == (1, False, "the last rank was told to")
    assert open_checkpoint(toml.parent / "stopped" / "checkpoints").step == 1


@few
def test_a_damaged_checkpoint_is_passed_over(world: Intracomm, toml: Path, caplog: pytest.LogCaptureFixture) -> None:
    layout = PAIRS[world.size][0]
    whole = run(toml, world, "damaged", layout, "checkpoint.every=3", "checkpoint.keep=2")
    newest = toml.parent / "damaged" / "checkpoints" / "step_00000006"
    if world.rank == 0:
        file = sorted(newest.glob("*.h5"))[0]
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    world.Barrier()
    again = run(toml, world, "damaged", layout)
    assert again["loss"] == whole["loss"]  # steps 4 to 6 were taken again
    assert world.rank != 0 or "trying the one before" in caplog.text


@few
def test_a_save_that_fails_on_the_way_does_not_end_the_run(
    world: Intracomm, toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = load_config(
        toml, [f"run.directory={toml.parent / 'full'}", "checkpoint.every=2", *PAIRS[world.size][0].split()]
    )
    with Trainer(c, world) as trainer:
        save = trainer.save

        def full() -> Path:
            if trainer.step < 6:
                raise CheckpointSaveError("the disk is full")
            return save()

        monkeypatch.setattr(trainer, "save", full)
        assert trainer.train()["step"] == 6
    assert open_checkpoint(toml.parent / "full" / "checkpoints").step == 6


@few
def test_another_model_or_order_of_data_is_refused(world: Intracomm, toml: Path) -> None:
    layout = PAIRS[world.size][0]
    run(toml, world, "other", layout, "train.steps=1")
    with pytest.raises(InputError, match=r"model.ffn was 33, now it is 34"):
        run(toml, world, "other", layout, "model.ffn=34")
    with pytest.raises(InputError, match="seed was 0, now it is 1"):
        run(toml, world, "other", layout, "train.seed=1")


@few
def test_a_run_that_blows_up_ends_and_says_at_which_step(world: Intracomm, toml: Path) -> None:
    with pytest.raises(HpcmpError, match=r"step \d+: loss .*there is no checkpoint yet"):
        run(toml, world, "boom", PAIRS[world.size][0], "optimizer.learning_rate=1e30", "optimizer.warmup=0")


def test_the_trainer_takes_part_of_the_world(world: Intracomm, toml: Path) -> None:
    half = world.Split(world.rank % 2)
    summary = run(toml, half, f"half{world.rank % 2}", "train.steps=2")
    losses = world.allgather(summary["loss"])
    half.Free()
    assert max(losses) - min(losses) <= 1e-6 * losses[0]  # dp of different sizes: the same global batch


@few
def test_signals_are_left_to_the_command_line(world: Intracomm, toml: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run(toml, world, "signals", PAIRS[world.size][0], "train.steps=1")
    assert signal.getsignal(signal.SIGTERM) is before


@few
def test_the_log_says_where_the_mesh_lies(
    world: Intracomm, toml: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "hpcmp")
    monkeypatch.setenv("HPCMP_NODES", "0,1")
    run(toml, world, "placed", "train.steps=1")
    assert ("2 nodes of " in caplog.text) is (world.rank == 0 and world.size > 1)
