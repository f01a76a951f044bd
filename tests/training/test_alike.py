"""Fault: ranks that were started with different configurations, seeds or versions of hpcmp."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hpcmp.data.prepare import prepare
from hpcmp.errors import InputError
from hpcmp.training import alike
from hpcmp.training.config import Config, Train, load_config
from hpcmp.training.trainer import Trainer
from tests.corpus import config as config_file
from tests.corpus import corpus

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


def test_each_difference_is_told_with_its_ranks() -> None:
    found = [{"train.seed": 0, "model.style": "gpt", "same": 1} for _ in range(4)]
    found[2] |= {"train.seed": 7}
    found[3] |= {"train.seed": 7, "model.style": "llama"}
    assert alike.differences(found) == (
        "train.seed is 0 on ranks 0-1, 7 on ranks 2-3; model.style is 'gpt' on ranks 0-2, 'llama' on rank 3"
    )
    many = [{f"a.{i}": rank for i in range(9)} for rank in range(2)]
    assert alike.differences(many).endswith("; and 4 keys more")


def test_the_code_is_known_by_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hpcmp" / "training"
    folder.mkdir(parents=True)
    seen = set()
    for content in ("x = 1\n", "x = 2\n", "x = 1\n"):
        (folder / "alike.py").write_text(content)
        monkeypatch.setattr(alike, "__file__", str(folder / "alike.py"))
        alike.code.cache_clear()
        seen.add(alike.code())
    alike.code.cache_clear()
    assert len(seen) == 2


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("what", ["seed", "layout", "code", "choices"])
@pytest.mark.fault(13)
def test_a_rank_that_differs_is_refused_on_all(
    world: Intracomm, what: str, monkeypatch: pytest.MonkeyPatch, mpi_tmp_path: Path
) -> None:
    odd, last = world.rank == world.size - 1, world.size - 1
    config = Config()
    if what == "seed":
        config = dataclasses.replace(config, train=Train(seed=7 if odd else 0))
    elif what == "layout":  # ranks that cut their groups differently would wait for each other for ever
        config = dataclasses.replace(config, layout=dataclasses.replace(config.layout, tp=world.size if odd else 1))
    elif what == "choices":  # of algorithms of matrix products
        file = mpi_tmp_path / f"choices{odd:d}"
        file.write_text(f"{odd}")
        monkeypatch.setenv("HPCMP_GEMM_CHOICES", str(file))
    elif odd:
        monkeypatch.setattr(alike, "code", lambda: "0.0.1, sources 00")
    keys = {"seed": "train.seed is 0", "layout": "layout.tp is 1", "code": "hpcmp is ", "choices": "HPCMP_GEMM_CHOICES"}
    key = keys[what]
    with pytest.raises(InputError, match=rf"different settings: {key}.* on rank.*, .* on rank {last}$"):
        Trainer(config, world)


@pytest.mark.mpi(min_size=2)
@pytest.mark.fault(13)
def test_data_that_differ_between_nodes_are_refused(
    world: Intracomm, mpi_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mpi_tmp_path / f"node{world.rank == 1:d}"
    if world.rank < 2:
        folder.mkdir()
        path = corpus(folder)
        if world.rank == 1:
            (folder / "text" / "0.py").write_text("x = 1\n" * 300)
            path.unlink()
            prepare([folder / "text"], path, held_out=0.2)
        config_file(folder, Path("tokens.h5"))
    world.Barrier()
    monkeypatch.chdir(folder)
    config = load_config("tiny.toml", [f"run.directory={mpi_tmp_path / 'run'}"])
    with pytest.raises(InputError, match="tokens.h5 is not the same file on every rank: train is .* on rank 1"):
        Trainer(config, world)


@pytest.mark.mpi
def test_equal_ranks_pass_and_nothing_of_the_callers_communicator_is_used(world: Intracomm) -> None:
    alike.check_alike(Config(), world)
    alike.check_alike(Config(), None)
