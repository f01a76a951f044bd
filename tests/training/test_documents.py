"""Runs whose documents are kept apart: where the token that closes them comes from, resuming, and generating."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.checkpoint import open_checkpoint
from hpcmp.errors import InputError
from hpcmp.training.config import Config, Data, Model, load_config
from hpcmp.training.generate import Generator
from hpcmp.training.trainer import Trainer
from hpcmp.training.verify import resolve, source_of
from tests.layouts import engine, small

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

END = 256  # of tokens that are bytes


def run(toml: Path, world: Any, name: str, *given: str) -> dict[str, Any]:
    """Train in the run directory ``name``; the summary."""
    with Trainer(load_config(toml, [f"run.directory={toml.parent / name}", *given]), world) as trainer:
        return trainer.train()


@pytest.mark.mpi(size=1)
@pytest.mark.mpi(size=2)
def test_a_run(world: Intracomm, toml: Path) -> None:
    """Its losses are others; it takes the token from the data, and may go on with documents joined, or begin so."""
    layout = f"layout.cp={world.size}"
    joined = run(toml, world, "joined", layout, "train.steps=3")
    apart = run(toml, world, "apart", layout, "train.steps=3", "data.documents=apart")
    assert joined["loss"] != apart["loss"] and joined["held_out_loss"] != apart["held_out_loss"]
    assert apart["loss"] == pytest.approx(joined["loss"], rel=0.05)
    for name, documents in (("joined", "apart"), ("apart", "joined")):
        assert run(toml, world, name, layout, f"data.documents={documents}")["step"] == 6
        data = open_checkpoint(toml.parent / name / "checkpoints").state["config"]["data"]
        assert (data["documents"], data["end_of_document"]) == (documents, END)


@pytest.mark.mpi(size=1)
def test_generating_keeps_documents_apart_as_in_training(world: Intracomm, toml: Path) -> None:
    for documents, same in (("apart", True), ("joined", False)):
        run(toml, world, documents, f"data.documents={documents}")
        with Generator(str(toml.parent / documents / "checkpoints")) as generator:
            found = generator.logits([65, END, 66, 67]), generator.logits([66, 67])
            assert np.allclose(*found, rtol=1e-5, atol=1e-6) == same


@pytest.mark.mpi(size=1)
def test_another_token_than_the_data_has_is_refused(world: Intracomm, toml: Path) -> None:
    with pytest.raises(InputError, match=r"^data.end_of_document = 10: .*tokens.h5 closes documents with 256$"):
        run(toml, world, "run", "data.end_of_document=10")


@pytest.mark.mpi(size=1)
def test_verify_takes_the_token_from_the_data(world: Intracomm, toml: Path) -> None:
    config = resolve(load_config(toml, ["data.documents=apart"]))
    assert config.data.end_of_document == END


def test_without_data_it_is_the_last_token() -> None:
    assert Config(model=Model(vocabulary=9)).resolved().data.end_of_document == 8
    assert Config().resolved().data.end_of_document is None
    assert Config(data=Data(path="a.h5")).resolved(vocabulary=9).data.end_of_document is None
    assert Config(data=Data(path="a.h5")).resolved(vocabulary=9, end_of_document=4).data.end_of_document == 4
    assert Config(data=Data(end_of_document=3)).resolved(vocabulary=9, end_of_document=4).data.end_of_document == 3


def test_one_that_is_no_token_is_refused() -> None:
    with pytest.raises(InputError, match=r"^data.end_of_document = 9 is none of the model.vocabulary = 9 tokens$"):
        Config(data=Data(end_of_document=9)).resolved(vocabulary=9)


def test_a_loop_of_its_own_has_to_say_which_it_is() -> None:
    config = small(documents="apart")
    config = dataclasses.replace(config, data=Data(path="a.h5", documents="apart"))
    with engine(config) as e, pytest.raises(InputError, match='^data.documents = "apart" needs data.end_of_document'):
        e.step(0, *source_of(small())(0, slice(0, 6)))
