"""Models to Hugging Face's format and back: the published formulas find the same logits, and every bit comes home."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcmp.arrays import dtype_of
from hpcmp.checkpoint import Slab, open_checkpoint, save, slab
from hpcmp.checkpoint.safetensors_model import INDEX, NAME
from hpcmp.comm.mesh import Mesh
from hpcmp.cursor import Cursor, Place
from hpcmp.errors import CheckpointError, InputError
from hpcmp.layers.parallel import ModelParallel
from hpcmp.models.transformer import build
from hpcmp.training import importing
from hpcmp.training.config import Config, Model, Train
from hpcmp.training.engine import architecture
from hpcmp.training.exporting import export_model
from hpcmp.training.importing import import_model
from tests.models import published

pytestmark = pytest.mark.timeout(300)

MODELS = {
    "gpt": Model(style="gpt", layers=2, hidden=20, heads=5, ffn=33, vocabulary=23, sequence=9, norm_epsilon=1e-3),
    "gpt, not tied": Model(style="gpt", layers=1, hidden=12, heads=2, vocabulary=11, sequence=8, tied=False),
    "llama": Model(
        style="llama", layers=2, hidden=20, heads=6, kv_heads=2, head_size=4, ffn=7, vocabulary=13, sequence=9,
        rope_theta=500.0, norm_epsilon=1e-2,
    ),
    "llama, tied, biases": Model(
        style="llama", layers=3, hidden=16, heads=3, kv_heads=1, head_size=6, vocabulary=13, sequence=9, tied=True,
        bias=True,
    ),
}  # fmt: skip

every = pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))


def weights(model: Model, dtype: str = "float64", seed: int = 3) -> dict[str, Any]:
    """name -> array of a model, biases and scales included."""
    rng = np.random.default_rng(seed)
    parameters = build(architecture(Config(model=model.resolved()))).parameters()
    return {p.name: (rng.normal(size=p.shape) * 0.3 + ("norm/weight" in p.name)).astype(dtype) for p in parameters}


def write(root: Path, model: Model, dtype: str = "float64", tokenizer: str = "bytes", **more: Any) -> Path:
    """A checkpoint of that model, from this process alone."""
    config = Config(model=model, train=Train(dtype=dtype)).resolved(ranks=1)
    arrays = {f"model/{name}": array for name, array in weights(model, dtype).items()} | more
    if tokenizer:
        arrays["tokenizer"] = np.frombuffer(tokenizer.encode(), np.uint8)
    slabs = [Slab(name, a.shape, tuple(slice(0, n) for n in a.shape), a) for name, a in arrays.items()]
    return save(root, 7, slabs, {"config": config.to_dict()}, Mesh())


def our_logits(path: Path, tokens: Any) -> Any:
    """(positions, vocabulary), by our model with a checkpoint's weights."""
    checkpoint = open_checkpoint(path)
    config = Config.from_dict(checkpoint.state["config"])
    cursor = Cursor()
    cursor.place = Place(length=len(tokens), training=False)
    model = build(architecture(config), ModelParallel(None, cursor))
    parameters = model.initialise(0, np.float64)
    checkpoint.load([Slab(f"model/{p.name}", p.shape, p.index, p.data) for p in parameters])
    return model.forward(tokens[:, None])[0][:, 0]


def same(one: Path, other: Path, only: str = "") -> bool:
    """Whether two checkpoints hold the same bits."""
    a, b = open_checkpoint(one), open_checkpoint(other)
    names = {name for name in a.tensors if name.startswith(only)}
    assert a.tensors == b.tensors and names
    return all(a.read(name).tobytes() == b.read(name).tobytes() for name in names)


@every
@pytest.mark.parametrize(("dtype", "exact"), [(None, 1e-12), ("float32", 1e-5), ("float16", 2e-2), ("bfloat16", 2e-1)])
def test_the_published_formulas_find_the_same_logits(tmp_path: Path, model: Model, dtype: str, exact: float) -> None:
    path = write(tmp_path / "a", model)
    export_model(open_checkpoint(path), tmp_path / "b", dtype=dtype)
    tokens = np.random.default_rng(1).integers(0, model.vocabulary, model.sequence)
    ours, theirs = our_logits(path, tokens), published.logits(tmp_path / "b", tokens)
    assert ours.shape == theirs.shape and np.abs(ours).max() > 0.5
    assert np.abs(ours - theirs).max() <= exact * np.abs(ours).max()
    if dtype:
        assert np.abs(ours - theirs).max() > 1e-9  # it is rounded


@pytest.mark.parametrize(
    ("name", "dtype", "limit"),
    [
        *(("gpt", "float32", 5_000_000_000), ("gpt", "float64", 3000), ("gpt, not tied", "float32", 3000)),
        *(("llama", "float64", 5_000_000_000), ("llama", "float32", 1), ("llama, tied, biases", "float32", 3000)),
    ],
)
def test_what_was_exported_and_imported_is_the_same_bit_for_bit(
    tmp_path: Path, name: str, dtype: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slab, "BLOCK", 600)  # so that blocks are parts of a tensor, and of a row of some
    model = MODELS[name]
    path = write(tmp_path / "a", model, dtype)
    files = export_model(open_checkpoint(path), tmp_path / "b", shard_bytes=limit)
    assert (NAME in files) == (limit > 3000) and (INDEX in files) == (limit <= 3000)
    made, config = import_model(tmp_path / "b", tmp_path / "c", Mesh())
    assert made == tmp_path / "c" / "step_00000000" and same(path, made)
    assert config.train.dtype == dtype and config.model == model.resolved()
    assert open_checkpoint(made).verify() == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_are_rounded_once_and_come_back_as_float32(tmp_path: Path, dtype: str) -> None:
    path = write(tmp_path / "a", MODELS["llama"], "float32")
    export_model(open_checkpoint(path), tmp_path / "b", dtype=dtype)
    made, _ = import_model(tmp_path / "b", tmp_path / "c", Mesh())
    a, b = open_checkpoint(path), open_checkpoint(made)
    for name in (name for name in a.tensors if name != "tokenizer"):
        found = b.read(name)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, a.read(name).astype(dtype_of(dtype)).astype(np.float32))


def test_what_float16_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    model = MODELS["gpt"]
    path = write(tmp_path / "a", model, "float32", **{"model/norm/weight": np.full(20, 70000, np.float32)})
    with pytest.raises(InputError, match="float16 cannot hold transformer.ln_f.weight"):
        export_model(open_checkpoint(path), tmp_path / "out" / "b", dtype="float16")
    assert list((tmp_path / "out").iterdir()) == []
    export_model(open_checkpoint(path), tmp_path / "out" / "b", dtype="bfloat16")


def test_export_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a", MODELS["gpt"])
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match="is there already"):
        export_model(open_checkpoint(path), tmp_path / "b")
    other = write(
        tmp_path / "c", Model(style="gpt", layers=1, hidden=12, heads=4, kv_heads=2, vocabulary=5, sequence=4)
    )
    with pytest.raises(InputError, match="model.kv_heads"):
        export_model(open_checkpoint(other), tmp_path / "d")
    save(tmp_path / "e", 1, [Slab("x", (1,), (slice(0, 1),), np.zeros(1))], {}, Mesh())
    with pytest.raises(InputError, match=str(tmp_path / "e")):
        export_model(open_checkpoint(tmp_path / "e"), tmp_path / "d")
    state = open_checkpoint(path).state
    save(tmp_path / "f", 1, [Slab("model/norm/weight", (1,), (slice(0, 1),), np.zeros(1))], state, Mesh())
    with pytest.raises(InputError, match="there is no model/"):
        export_model(open_checkpoint(tmp_path / "f"), tmp_path / "d")
    assert not (tmp_path / "d").exists() and len(list(tmp_path.iterdir())) == 5


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    path = write(tmp_path / "a", MODELS["gpt"])
    extents = next(iter(open_checkpoint(path).manifest.files.values())).extents
    with open(path / "rank_00000.h5", "r+b") as file:
        file.seek(extents[0][0] + 100)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    with pytest.raises(CheckpointError, match="damaged"):
        export_model(open_checkpoint(path), tmp_path / "b")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_the_tokenizer_travels(tmp_path: Path) -> None:
    definition = '{"version": "1.0", "ü": []}'
    for name, text in (("json", definition), ("bytes", "bytes"), ("none", "")):
        path = write(tmp_path / name / "a", MODELS["gpt"], tokenizer=text)
        files = export_model(open_checkpoint(path), tmp_path / name / "b")
        assert ("tokenizer.json" in files) == (name == "json")
        made, _ = import_model(tmp_path / name / "b", tmp_path / name / "c", Mesh())
        assert same(path, made)
    config = json.loads((tmp_path / "bytes" / "b" / "config.json").read_text())
    assert config["eos_token_id"] == 256 and config["architectures"] == ["GPT2LMHeadModel"]
    made, _ = import_model(tmp_path / "json" / "b", tmp_path / "d", Mesh(), tokenizer="bytes")
    assert open_checkpoint(made).read("tokenizer").tobytes() == b"bytes"


def test_neither_way_holds_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of 2 MB, in blocks of 128 KiB."""
    monkeypatch.setattr(slab, "BLOCK", 1 << 17)
    model = Model(style="llama", layers=1, hidden=64, heads=4, ffn=300, vocabulary=8_000, sequence=8)
    path = write(tmp_path / "a", model, "float32")
    for work in (
        lambda: export_model(open_checkpoint(path), tmp_path / "b"),
        lambda: import_model(tmp_path / "b", tmp_path / "c", Mesh()),
    ):
        tracemalloc.start()
        work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3 << 19, f"{peak / 2**20:.1f} MiB"
    assert same(path, tmp_path / "c")


@pytest.mark.mpi(size=3)
def test_any_number_of_ranks_make_the_same(world: Any, mpi_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks share the files that are written, and the tensors that are read."""
    monkeypatch.setattr(importing, "PIECE", 400)
    model = MODELS["llama"]
    if world.rank == 0:
        write(mpi_tmp_path / "a", model, "float32")
    world.barrier()
    with Mesh(world, dp=world.size) as mesh:
        told: list[tuple[int, int]] = []
        checkpoint = open_checkpoint(mpi_tmp_path / "a", mesh)
        files = export_model(checkpoint, mpi_tmp_path / "b", shard_bytes=1000, progress=lambda *at: told.append(at))
        assert INDEX in files and told[-1][0] == told[-1][1]
        with pytest.raises(InputError, match="is there already"):
            export_model(checkpoint, mpi_tmp_path / "b")
        made, _ = import_model(mpi_tmp_path / "b", mpi_tmp_path / "c", mesh)
        if world.rank == 0:
            assert same(mpi_tmp_path / "a", made) and open_checkpoint(made).verify() == []
            manifest = open_checkpoint(made).manifest
            assert sum(name.startswith("rank_") for name in manifest.files) == world.size
            (mpi_tmp_path / "b" / "config.json").unlink()
        world.barrier()
        with pytest.raises(InputError, match="config.json"):
            import_model(mpi_tmp_path / "b", mpi_tmp_path / "d", mesh)
