"""A model in Hugging Face's format as a checkpoint: what ``generate`` takes, and ``checkpoint.initial`` of a run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__, partition
from ..arrays import dtype_of
from ..checkpoint import Slab, checkpoints, save
from ..checkpoint.agree import agreed
from ..checkpoint.directory import check_folder
from ..checkpoint.relayout import fill
from ..checkpoint.safetensors import read_json
from ..checkpoint.safetensors_model import SafetensorsModel
from ..checkpoint.slab import Index, Region
from ..checkpoint.storage import Storage
from ..data.tokenizer import ByteTokenizer
from ..errors import CheckpointError, InputError
from ..models import hugging_face
from ..models.architecture import Architecture
from ..models.hugging_face import Part, Tensor
from ..models.hugging_face_config import from_config
from ..plain import read_whole
from .config import Config, Model, Train
from .engine import architecture
from .exporting import BYTES, CONFIG, TOKENIZER

if TYPE_CHECKING:
    from ..comm.mesh import Mesh

PIECE = 256 << 20  # bytes of a tensor that one of several ranks imports
TOKENIZER_LIMIT = 256 << 20  # bytes


def import_model(
    source: Path, root: Path, mesh: Mesh, *, tokenizer: str | None = None, storage: Storage | str = "auto"
) -> tuple[Path, Config]:
    """Save a GPT-2 or Llama of Hugging Face as the checkpoint of step 0 in ``root``; its path, and the configuration
    in it, of which only the model means anything.

    source: the folder of config.json and model.safetensors or its index, or one safetensors file beside config.json.
    tokenizer: its definition (``data.tokenizer``); None: that of the folder, if there is one. Numbers of 16 bits become
    float32, exactly. The ranks of ``mesh`` share the tensors; a rank has a block of 16 MiB in hand, and none has the
    model. Collective. Raises InputError (CheckpointError for damaged files) and CheckpointSaveError, the same on all
    ranks.
    """
    with agreed(mesh, _failed):
        check_folder(root)
        if checkpoints(root):
            raise InputError(f"{root}: there are checkpoints in it already; import to a new folder")
        if not source.exists():
            raise InputError(f"{source}: there is no such folder, or safetensors file")
        folder = source if source.is_dir() else source.parent
        if not (folder / CONFIG).exists():
            raise InputError(f"{folder}: no model of Hugging Face's: there is no {CONFIG} in it")
        given = read_json(folder / CONFIG)
        files = SafetensorsModel(source)
    with files:
        with agreed(mesh, _failed):
            config = _config(given, folder, files)
            slabs = list(_slabs(files, architecture(config), dtype_of(config.train.dtype), mesh))
            definition = tokenizer or _definition(folder, given)
            if mesh.rank == 0 and definition:
                text = np.frombuffer(definition.encode(), np.uint8)
                slabs.append(Slab("tokenizer", text.shape, (slice(0, text.size),), text))
        state = {"hpcmp": __version__, "config": config.to_dict(), "imported": str(source)}
        return save(root, 0, slabs, state, mesh, storage=storage, keep=None), config


def _failed(who: str, why: str) -> InputError:
    return InputError(why)


def _config(given: dict[str, Any], folder: Path, files: SafetensorsModel) -> Config:
    """The configuration of their model, once it is known that the files hold this model and nothing else."""
    try:
        model = Model(**from_config(given)).resolved()
        if model.layers > len(files.tensors):  # before a table of so many is made
            raise InputError(f"{model.layers} layers, and there are {len(files.tensors)} tensors")
        a = architecture(Config(model=model))
        tensors = list(hugging_face.tensors(a))
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None
    names = {hugging_face.find(tensor.name, files.tensors): tensor for tensor in tensors}
    for name, tensor in names.items():
        shape, dtype = files.tensors.get(name, (None, None))
        if dtype is None:
            raise CheckpointError(f"{files.path}: there is no tensor {name}")
        if shape != tensor.shape or dtype.name not in ("float64", "float32", "float16", "bfloat16"):
            have = f"{dtype.name} {list(shape or ())}"
            raise CheckpointError(f"{files.path}: {name} is {have}, where {CONFIG} wants numbers {list(tensor.shape)}")
    for name in files.tensors:
        if name not in names and hugging_face.is_weight(name, a):
            raise CheckpointError(f"{files.path}: {name} has no place in a {given['model_type']} of hpcmp")
    wide = any(files.tensors[name][1].name == "float64" for name in names)
    train = Train(dtype="float64" if wide else "float32")
    return Config(model=model, train=train).resolved(ranks=1)


def _slabs(files: SafetensorsModel, a: Architecture, dtype: np.dtype[Any], mesh: Mesh) -> Iterator[Slab]:
    """What this rank saves: pieces of all tensors go to the ranks in turn, so that they have equally much to read."""
    turn = itertools.cycle(range(mesh.size))
    for name, (shape, parts) in hugging_face.ours(a).items():
        pieces = min(mesh.size, -(-math.prod(shape) * dtype.itemsize // PIECE))
        for cut in partition.split(shape[0], pieces):
            if next(turn) == mesh.rank:
                index = (cut, *(slice(0, n) for n in shape[1:]))
                region = Region(tuple(s.start for s in index), tuple(s.stop - s.start for s in index))
                yield Slab(f"model/{name}", shape, index, _Imported(files, parts, region, dtype))


class _Imported:
    """A part of a tensor of ours, made of theirs whenever a slice of it is asked for: the data of a Slab."""

    def __init__(
        self, files: SafetensorsModel, parts: Sequence[tuple[Tensor, Part]], region: Region, dtype: np.dtype[Any]
    ) -> None:
        self.files, self.parts, self.region = files, parts, region
        self.shape, self.dtype = region.count, dtype

    def __getitem__(self, index: Index) -> NDArray[Any]:
        start = tuple(a + s.start for a, s in zip(self.region.start, index, strict=True))
        region = Region(start, tuple(s.stop - s.start for s in index))
        made = np.empty(region.count, self.dtype)
        for tensor, part in self.parts:
            fill(made, region, part.ours, part.theirs, partial(self._read, tensor))
        return made

    def _read(self, tensor: Tensor, region: Region) -> NDArray[Any]:
        return self.files.read(hugging_face.find(tensor.name, self.files.tensors), region, tensor.view)


def _definition(folder: Path, given: dict[str, Any]) -> str:
    """The definition of the folder's tokenizer, "" if there is none."""
    if given.get(BYTES) == ByteTokenizer.definition:
        return ByteTokenizer.definition
    path = folder / TOKENIZER
    if not path.exists():
        return ""
    try:
        return read_whole(path, TOKENIZER_LIMIT, links=True).decode()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a tokenizer.json: it is not UTF-8 text") from None
