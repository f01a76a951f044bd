"""A model in safetensors files: one, or several that ``model.safetensors.index.json`` names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..errors import CheckpointError
from .safetensors import Kind, SafetensorsFile, read_json
from .slab import Region

NAME = "model.safetensors"
INDEX = "model.safetensors.index.json"
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")


class SafetensorsModel:
    """The tensors of the file ``path``, or of the folder's index, or of its ``model.safetensors``.

    tensors: name -> (shape, dtype). Raises CheckpointError naming the file and what is wrong. The index may only name
    files beside itself, and a tensor that it does not name is none of the model's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, SafetensorsFile] = {}  # of each tensor
        with ExitStack() as stack:
            if (path / INDEX).exists():
                places = _weight_map(path / INDEX)
                for file in sorted(set(places.values())):
                    found = stack.enter_context(closing(SafetensorsFile(path / file)))
                    self._files |= {name: found for name, place in places.items() if place == file}
            else:
                found = stack.enter_context(closing(SafetensorsFile(path / NAME if path.is_dir() else path)))
                self._files = dict.fromkeys(found.tensors, found)
            for name, file_ in self._files.items():
                if name not in file_.tensors:
                    raise CheckpointError(f"{file_.path}: there is no tensor {name!r:.80} in it, as {INDEX} says")
            self._open = stack.pop_all()
        stored = {name: file.tensors[name] for name, file in self._files.items()}
        self.tensors: dict[str, Kind] = {name: (t.shape, t.dtype) for name, t in stored.items()}

    def read(self, name: str, region: Region, shape: tuple[int, ...]) -> NDArray[Any]:
        """See ``SafetensorsFile.read``."""
        return self._files[name].read(name, region, shape)

    def __enter__(self) -> SafetensorsModel:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()


def shards(tensors: Mapping[str, Kind], limit: int) -> dict[str, dict[str, Kind]]:
    """The files of a model, by name, in order: each of at most ``limit`` bytes of numbers, or of a single tensor."""
    parts: list[dict[str, Kind]] = [{}]
    room = limit
    for name, kind in tensors.items():
        size = _bytes(kind)
        if size > room and parts[-1]:
            parts.append({})
            room = limit
        parts[-1][name] = kind
        room -= size
    if len(parts) == 1:
        return {NAME: parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def index_text(files: Mapping[str, Mapping[str, Kind]]) -> str:
    """The text of the index of ``shards``."""
    total = sum(_bytes(kind) for part in files.values() for kind in part.values())
    weight_map = {name: file for file, part in files.items() for name in part}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def _weight_map(path: Path) -> dict[str, str]:
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path}: there is no weight_map in it")
    for file in places.values():
        if not isinstance(file, str) or not FILE.fullmatch(file):
            raise CheckpointError(f"{path}: {str(file)[:64]!r} is not the plain name of a safetensors file")
    return places


def _bytes(kind: Kind) -> int:
    shape, dtype = kind
    return math.prod(shape) * dtype.itemsize
