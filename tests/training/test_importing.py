"""Models in Hugging Face's format, as others write them: what is taken, what is refused; runs that begin with one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcmp.checkpoint import open_checkpoint
from hpcmp.checkpoint import safetensors as files
from hpcmp.checkpoint.safetensors_model import NAME
from hpcmp.comm.mesh import Mesh
from hpcmp.errors import InputError
from hpcmp.training.config import load_config
from hpcmp.training.exporting import export_model
from hpcmp.training.importing import import_model
from hpcmp.training.trainer import Trainer
from tests.corpus import config as corpus_config
from tests.corpus import corpus
from tests.models import published
from tests.training.test_exporting import MODELS, same, write

pytestmark = pytest.mark.timeout(300)


def exported(tmp_path: Path, name: str, **more: Any) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """(folder, config.json, tensors) of an exported model."""
    folder = tmp_path / "b"
    export_model(open_checkpoint(write(tmp_path / "a", MODELS[name], "float32")), folder)
    return folder, *published.read(folder)


def store(folder: Path, config: dict[str, Any], arrays: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / NAME).unlink()
    files.write(folder / NAME, {n: (a.shape, a.dtype) for n, a in arrays.items()}, lambda n: [arrays[n]])


def test_files_as_the_hub_has_them(tmp_path: Path) -> None:
    """Without the prefix, with masks and with a copy of the tied table, behind links."""
    folder, config, arrays = exported(tmp_path, "gpt")
    bare = {name.removeprefix("transformer."): array for name, array in arrays.items()}
    more = {
        "h.0.attn.bias": np.tril(np.ones((1, 1, 9, 9), np.float32)),
        "lm_head.weight": arrays["transformer.wte.weight"],
    }
    store(folder, config, bare | more)
    (tmp_path / "hub").mkdir()
    for path in folder.iterdir():
        (tmp_path / "hub" / path.name).symlink_to(path)
    for source in (tmp_path / "hub", tmp_path / "hub" / NAME):
        made, _ = import_model(source, tmp_path / "c", Mesh())
        assert same(tmp_path / "a", made)
        shutil.rmtree(tmp_path / "c")


def refusals(config: dict[str, Any], arrays: dict[str, Any]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """What an error says -> the files that it is about."""
    name = "model.layers.1.self_attn.k_proj.weight"
    rest = {n: a for n, a in arrays.items() if n != name}
    return {
        f"there is no tensor {name}": (config, rest),
        f"{name} is float32 \\[8, 19\\]": (config, rest | {name: np.zeros((8, 19), "f4")}),
        f"{name} is int32": (config, rest | {name: np.zeros((8, 20), "i4")}),
        "q_norm.weight has no place": (config, arrays | {"model.layers.0.self_attn.q_norm.weight": np.zeros(4, "f4")}),
        "config.json: 1000000000000 layers": (config | {"num_hidden_layers": 10**12}, arrays),
        "config.json: model.layers": (config | {"num_hidden_layers": 0}, arrays),
        "config.json: model.kv_heads": (config | {"num_key_value_heads": 4}, arrays),
        "config.json: rope_scaling": (config | {"rope_scaling": {"type": "yarn"}}, arrays),
        "embed_tokens.weight is .* wants": (config | {"vocab_size": 2**60}, arrays),
    }


@pytest.mark.parametrize("case", range(9))
def test_import_is_refused(tmp_path: Path, case: int) -> None:
    folder, config, arrays = exported(tmp_path, "llama")
    said, (config, arrays) = list(refusals(config, arrays).items())[case]
    store(folder, config, arrays)
    with pytest.raises(InputError, match=said) as caught:
        import_model(folder, tmp_path / "c", Mesh())
    assert str(folder) in str(caught.value) and not (tmp_path / "c").exists()


def test_import_needs_a_new_folder_and_a_config(tmp_path: Path) -> None:
    folder, *_ = exported(tmp_path, "gpt")
    with pytest.raises(InputError, match="there are checkpoints in it already"):
        import_model(folder, tmp_path / "a", Mesh())
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="config.json"):
        import_model(folder, tmp_path / "c", Mesh())


@pytest.mark.mpi(size=3)
def test_a_run_begins_with_the_weights_of_a_checkpoint(world: Any, mpi_tmp_path: Path) -> None:
    """An imported model, or another run's; the optimizer begins anew, and a run that goes on does not begin again."""
    data = mpi_tmp_path
    if world.rank == 0:
        corpus_config(data, corpus(data))
        toml = (data / "tiny.toml").read_text().replace("kv_heads = 2\n", "").replace("dropout = 0.1\n", "")
        (data / "tiny.toml").write_text(toml)
    world.barrier()

    def trainer(name: str, *words: str) -> Trainer:
        given = [f"run.directory={data / name}", "train.batch=8", *words]
        return Trainer(load_config(data / "tiny.toml", given), world)

    with trainer("first", "train.steps=2", "train.seed=5") as first:
        first.train()
    with Mesh(world, dp=world.size) as mesh:
        export_model(open_checkpoint(data / "first" / "checkpoints", mesh), data / "hub")
        import_model(data / "hub", data / "imported", mesh)
    initial = f"checkpoint.initial={data / 'imported'}"
    with trainer("second", "train.steps=1", initial) as second:
        second.save()
        assert second.step == 0 and second.engine.optimizer.steps == 0
        if world.rank == 0:
            assert same(data / "first" / "checkpoints", data / "second" / "checkpoints", "model/")
    with trainer("second", "train.steps=3", f"checkpoint.initial={data / 'nowhere'}") as again:
        assert again.step == 0  # it goes on, and does not ask for the initial weights
        again.train()
    with pytest.raises(InputError, match="model.layers was 3, now it is 2"):
        trainer("third", "model.layers=2", initial)
    with pytest.raises(InputError, match="checkpoint.initial"):
        trainer("fourth", f"checkpoint.directory={data / 'imported'}")
