"""Fault: silent corruption: a bit that flips in one copy of a weight is found, and the rank that has it is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.checkpoint import checkpoints
from hpcmp.errors import HpcmpError
from hpcmp.training.config import load_config
from hpcmp.training.replicas import ReplicaError, check_replicas
from hpcmp.training.trainer import Trainer
from tests.corpus import config, corpus
from tests.training.test_trainer import PAIRS, ZERO

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi


@pytest.fixture
def trainer(world: Intracomm, mpi_tmp_path: Path) -> Callable[..., Trainer]:
    if world.rank == 0:
        config(mpi_tmp_path, corpus(mpi_tmp_path))
    world.Barrier()

    def make(*overrides: str) -> Trainer:
        given = [word for text in overrides for word in text.split()]
        return Trainer(load_config(mpi_tmp_path / "tiny.toml", given), world)

    return make


def flip(array: Any) -> None:
    """One of the higher bits of the first number's fraction: the lowest may be rounded away in the next step."""
    array.reshape(-1).view(np.uint8)[2] ^= 16


@pytest.mark.parametrize("pairs", [PAIRS, ZERO], ids=["plain", "zero"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sound_replicas_are_equal_on_every_layout(
    world: Intracomm, trainer: Callable[..., Trainer], pairs: dict[int, tuple[str, str]], dtype: str
) -> None:
    for layout in pairs[world.size]:
        with trainer(layout, f"train.dtype={dtype}", "train.steps=3") as t:
            for _ in t:
                check_replicas(t.engine, t.step)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("what", ["weight", "moment"])
@pytest.mark.fault(16)
def test_a_flipped_bit_on_one_replica_ends_the_run_before_a_save(
    world: Intracomm, trainer: Callable[..., Trainer], what: str
) -> None:
    bad = world.size - 1
    with trainer("train.replica_check=1000", "checkpoint.every=2") as t:
        name = ""
        with pytest.raises(HpcmpError) as error:
            for _ in t:
                if t.step == 3:
                    bucket = t.engine.buckets.buckets[0]
                    p = bucket.parameters[0]
                    name = f"model/{p.name}" if what == "weight" else f"optimizer/first/{p.name}"
                    arrays = {kind: a for kind, piece, a in t.engine.optimizer.state() if piece.parameter is p}
                    name = name.replace("first", next(iter(arrays)))
                    if world.rank == bad:
                        flip(bucket.master if what == "weight" else next(iter(arrays.values())))
        text = str(error.value)
        assert text.startswith("after step 4 copies differ: ") and name in text
        who = f"on rank {bad} not as on the other" if world.size > 2 else "on ranks 0-1, of which nothing tells"
        assert who in text
        saved = [path.name for path in checkpoints(t.checkpoints)]
        assert saved == ["step_00000002"] and text.endswith(f"the last checkpoint is {t.checkpoints / saved[0]}")


@pytest.mark.mpi(min_size=2)
@pytest.mark.fault(16)
def test_what_tensor_parallelism_repeats_is_compared(world: Intracomm, trainer: Callable[..., Trainer]) -> None:
    if world.size == 8:
        pytest.skip("more ranks than heads")
    with trainer(f"layout.tp={world.size}") as t:
        check_replicas(t.engine, 0)
        norm = next(p for p in t.engine.buckets.parameters if p.name.endswith("norm/weight"))
        if world.rank == 1:
            flip(norm.data)
        with pytest.raises(ReplicaError, match=norm.name):
            check_replicas(t.engine, 0)


@pytest.mark.mpi(min_size=2)
def test_steps_between_checks_are_counted(world: Intracomm, trainer: Callable[..., Trainer]) -> None:
    with trainer("train.replica_check=3") as t:
        with pytest.raises(HpcmpError, match="after step 3 copies differ"):
            for _ in t:
                if t.step == 1 and world.rank == 0:
                    flip(t.engine.buckets.buckets[0].master)
        assert t.step == 3
