"""Fault: a slow rank: it is named, with what it is slow in, while the others wait for it."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.training.config import load_config
from hpcmp.training.phases import PHASES, lags, spread
from hpcmp.training.trainer import Trainer
from tests.corpus import config, corpus

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


def table(ranks: int, **columns: list[float]) -> np.ndarray[Any, Any]:
    made = np.zeros((ranks, len(PHASES)))
    for name, column in columns.items():
        made[:, PHASES.index(name)] = column
    return made


def test_the_slowest_and_the_fastest_of_each_phase() -> None:
    found = spread(table(3, compute=[1.0, 3.0, 2.0], wait=[2.0, 0.0, 1.0]))
    assert found["compute"] == {"mean": 2.0, "least": 1.0, "fastest": 0, "most": 3.0, "slowest": 1}
    assert found["wait"]["slowest"] == 0 and found["data"]["most"] == 0


def test_a_rank_is_compared_with_those_like_it() -> None:
    seconds = [1.0, 1.0, 3.0, 3.1]  # two pipeline stages, of which the second has more to do
    assert lags(table(4, compute=seconds), [0, 0, 1, 1]) == []
    assert lags(table(4, compute=seconds), [0, 0, 0, 0]) == [("compute", 3, 0)]
    assert lags(table(4, compute=[1.0, 1.6, 3.0, 3.1]), [0, 0, 1, 1]) == [("compute", 1, 0)]
    assert lags(table(2, compute=[1.0, 3.0]), [0, 1]) == []  # nobody is like another
    assert lags(table(2, compute=[10.0, 10.0], data=[0.1, 0.5]), [0, 0]) == []  # not worth a word
    assert lags(table(2, compute=[1.0, 1.0], wait=[0.0, 9.0]), [0, 0]) == []  # waits are the fault of others
    assert lags(table(3, data=[0.1, 0.1, 5.0], optimizer=[2.0, 1.0, 1.0]), [0] * 3) == [
        ("data", 2, 0),
        ("optimizer", 0, 1),
    ]


@pytest.mark.mpi(size=1)
@pytest.mark.mpi(size=3)
@pytest.mark.fault(17)
def test_a_rank_that_sleeps_is_named_and_the_others_wait(
    world: Intracomm, mpi_tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if world.rank == 0:
        config(mpi_tmp_path, corpus(mpi_tmp_path))
    world.Barrier()
    slow, pause = world.size - 1, 0.5
    given = ["run.log_seconds=0", "run.evaluate_samples=1", "train.steps=3"]
    with Trainer(load_config(mpi_tmp_path / "tiny.toml", given), world) as trainer:
        if world.rank == slow:
            step = trainer.engine.pipeline.step

            def sleepy(*args: Any) -> Any:
                time.sleep(pause)
                return step(*args)

            trainer.engine.pipeline.step = sleepy  # type: ignore[method-assign]
        with caplog.at_level(logging.WARNING, "hpcmp"):
            trainer.train()
        path = trainer.metrics.path
    if world.rank == 0:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        looks = [record for record in records if "phases" in record]
        assert [record["step"] for record in looks] == [0, 1, 2]
        for record in looks[1:]:
            compute, wait = record["phases"]["compute"], record["phases"]["wait"]
            assert compute["slowest"] == slow and compute["most"] >= pause
            if world.size > 1:
                assert wait["fastest"] == slow and wait["most"] >= 0.5 * pause
                assert {"phase": "compute", "rank": slow} in [
                    {key: each[key] for key in ("phase", "rank")} for each in record["slow"]
                ]
            else:
                assert record["slow"] == []
        told = [r.message for r in caplog.records if f"rank {slow} on " in r.message and "compute takes" in r.message]
        assert len(told) == (world.size > 1)  # once, as long as it lasts
