"""The model of a checkpoint as Hugging Face's transformers read it: safetensors, config.json, tokenizer.json."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import dtype_of
from ..checkpoint import Checkpoint, Slab, safetensors
from ..checkpoint.agree import agreed, broadcast
from ..checkpoint.directory import check_folder, discard, hidden, sweep, write_file
from ..checkpoint.relayout import fill
from ..checkpoint.safetensors import Kind
from ..checkpoint.safetensors_model import INDEX, index_text, shards
from ..checkpoint.slab import Region, placeholder
from ..checkpoint.writer import sync
from ..data.tokenizer import ByteTokenizer, tokenizer_from
from ..errors import CheckpointError, InputError
from ..models import hugging_face
from ..models.hugging_face import Part, Tensor
from ..models.hugging_face_config import to_config
from .engine import architecture
from .state import config_of

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
BYTES = "hpcmp_tokenizer"  # the key of config.json for a tokenizer that has no tokenizer.json: tokens are bytes
SHARD = 5_000_000_000  # bytes of a file, where nothing else is asked for
Progress = Callable[[int, int], None]


def export_model(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Write the model of a checkpoint to a new folder; the bytes of each file in it.

    There is model.safetensors, or files of at most ``shard_bytes`` (or of one tensor) and their index; config.json; and
    tokenizer.json, unless tokens are bytes. dtype: that of the numbers, as ``dtype_of`` knows it; None: as saved. What
    is written has been compared with its digests first. The folder appears complete or not at all; what an export to
    the same place left behind when it was killed is removed. A rank has a block of 16 MiB in hand, and none has the
    model. progress: is told how many bytes this rank has written, of how many.

    Collective if the checkpoint was opened with a mesh: its ranks share the files. Raises InputError (CheckpointError
    for a damaged checkpoint), the same on all ranks.
    """
    mesh = checkpoint.mesh
    rank, size = (0, 1) if mesh is None else (mesh.rank, mesh.size)
    temporary = None
    try:
        with agreed(mesh, _failed):
            model = _Exported(checkpoint, dtype)
            files = shards(model.kinds, shard_bytes)
            mine = list(files.items())[rank::size]
            if rank == 0 and os.path.lexists(folder):
                raise InputError(f"{folder}: is there already; export makes a new folder")
            check_folder(folder.parent)
        checkpoint.check(model.sources(name for _, part in mine for name in part))
        with agreed(mesh, _failed):
            if rank == 0:
                folder.parent.mkdir(parents=True, exist_ok=True)
                sweep(folder.parent, re.escape(folder.name))
                temporary = hidden(folder, "tmp")
                temporary.mkdir()
        temporary = broadcast(mesh, temporary)
        with agreed(mesh, _failed):
            blocks = _told(model, [name for _, part in mine for name in part], progress)
            for name, part in mine:
                safetensors.write(temporary / name, part, blocks)
        with agreed(mesh, _failed):
            if rank == 0:
                texts = model.texts() | ({INDEX: index_text(files)} if len(files) > 1 else {})
                for name, text in texts.items():
                    write_file(temporary / name, text.encode())
                sync(temporary)
                temporary.rename(folder)
                sync(folder.parent)
    except BaseException:
        if rank == 0 and temporary is not None and temporary.exists():
            discard(temporary)
        raise
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def _failed(who: str, why: str) -> InputError:
    return InputError(why)


def _told(model: _Exported, names: Iterable[str], progress: Progress | None) -> Callable[[str], Iterator[NDArray[Any]]]:
    """``model.blocks``, telling ``progress`` after each block how far it has come with the tensors ``names``."""
    done, total = 0, sum(math.prod(shape) * dtype.itemsize for shape, dtype in map(model.kinds.__getitem__, names))

    def blocks(name: str) -> Iterator[NDArray[Any]]:
        nonlocal done
        for block in model.blocks(name):
            yield block
            done += block.nbytes
            if progress:
                progress(done, total)

    return blocks


class _Exported:
    """Their tensors, made of a checkpoint's. kinds: name -> (shape, dtype)."""

    def __init__(self, checkpoint: Checkpoint, dtype: str | None) -> None:
        self.checkpoint = checkpoint
        self.architecture = architecture(config_of(checkpoint).resolved())
        self.tensors = {tensor.name: tensor for tensor in hugging_face.tensors(self.architecture)}
        for name, (shape, _) in hugging_face.ours(self.architecture).items():
            if checkpoint.tensors.get(f"model/{name}", (None,))[0] != shape:
                raise CheckpointError(f"{checkpoint.path}: there is no model/{name} of shape {shape}, as its model has")
        self.kinds: dict[str, Kind] = {
            name: (tensor.shape, self._saved(tensor) if dtype is None else dtype_of(dtype))
            for name, tensor in self.tensors.items()
        }

    def sources(self, names: Iterable[str]) -> list[Slab]:
        """The tensors of ours that their tensors ``names`` are made of: slabs to check, with no numbers in them."""
        ours = sorted({f"model/{part.name}" for name in names for part in self.tensors[name].parts})
        return [placeholder(name, *self.checkpoint.tensors[name]) for name in ours]

    def blocks(self, name: str) -> Iterator[NDArray[Any]]:
        """The numbers of a tensor of theirs, in C order. Raises InputError if the dtype cannot hold one of them."""
        tensor, (_, dtype) = self.tensors[name], self.kinds[name]
        saved = self._saved(tensor)
        for region in Region((0,) * len(tensor.view), tensor.view).blocks(saved.itemsize):
            made = np.empty(region.count, saved)
            for part in tensor.parts:
                fill(made, region, part.theirs, part.ours, partial(self._read, part))
            with np.errstate(over="ignore"):
                cast = made.astype(dtype, copy=False)
            if cast is not made and not np.isfinite(cast).all() and np.isfinite(made).all():
                raise InputError(f"{dtype} cannot hold {name}, which goes up to {np.abs(made).max():.3g}")
            yield cast

    def texts(self) -> dict[str, str]:
        """name -> text of the files besides the tensors."""
        definition, end = "", None
        if "tokenizer" in self.checkpoint.tensors:
            definition = self.checkpoint.read("tokenizer").tobytes().decode()
            try:
                end = tokenizer_from(definition).end_of_document
            except InputError:  # the package that reads it is not installed: the model is whole without this number
                pass
        _, dtype = next(iter(self.kinds.values()))
        config = to_config(self.architecture, dtype.name, end)
        if definition == ByteTokenizer.definition:
            config[BYTES], definition = definition, ""
        return {CONFIG: json.dumps(config, indent=2) + "\n"} | ({TOKENIZER: definition} if definition else {})

    def _saved(self, tensor: Tensor) -> np.dtype[Any]:
        return self.checkpoint.tensors[f"model/{tensor.parts[0].name}"][1]

    def _read(self, part: Part, region: Region) -> NDArray[Any]:
        index = tuple(slice(a, a + n) for a, n in zip(region.start, region.count, strict=True))
        return self.checkpoint.read(f"model/{part.name}", index, verify=False)
