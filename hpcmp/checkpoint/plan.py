"""Which rank writes which part into which dataset of which file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .manifest import is_whole, on_disk
from .runs import run_axis
from .slab import Region

Kind = tuple[tuple[int, ...], str]  # a tensor's shape and dtype
Place = tuple[str, Kind, Region]  # of a rank's part: name, kind, where in the tensor

WHOLE = "tensors.h5"  # every tensor by name in its global shape: the numbers, or where other files have them


@dataclass(frozen=True)
class Dataset:
    """A dataset to create: its path in the file, shape, dtype, and where in the tensor of ``whole`` shape it starts."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    origin: tuple[int, ...]
    whole: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What one rank does.

    storage: as in the manifest. file: the name of the file that its parts go to. places: its parts; targets: the
    dataset of each. datasets: all that are in that file, on the one rank that lays it out (``lays_out``). kinds: every
    tensor of the checkpoint, on rank 0. tensors: where the datasets of each lie, as (file, dataset), on rank 0, if
    there are several files. rounds: how many collective writes each tensor takes, the same on all ranks; tensors that
    are not named are written by each rank for itself.
    """

    storage: str
    file: str
    places: Sequence[Place]
    targets: Sequence[Dataset]
    lays_out: bool
    datasets: Sequence[Dataset] = ()
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    tensors: Mapping[str, Sequence[tuple[str, Dataset]]] | None = None
    rounds: Mapping[str, int] = field(default_factory=dict)

    @property
    def collective(self) -> bool:
        """Whether all ranks must write together, those without parts too."""
        return self.storage == "mpio"


def plans(storage: str, kinds: Mapping[str, Kind], told: Sequence[Sequence[Place]], nodes: Sequence[int]) -> list[Plan]:
    """The plan of each rank, whose parts are ``told[rank]`` in the order of their names, on the node ``nodes[rank]``.

    kinds: the tensors that the parts make up, in the order of their names.
    """
    if is_whole(storage):
        return _whole(storage, kinds, told)
    names = [f"rank_{rank:05d}.h5" if storage == "files" else f"node_{nodes[rank]:05d}.h5" for rank in range(len(told))]
    seen: Counter[tuple[str, str]] = Counter()
    contents: dict[str, list[Dataset]] = {}
    tensors: dict[str, list[tuple[str, Dataset]]] = {name: [] for name in kinds}
    targets: list[list[Dataset]] = []
    makers: dict[str, int] = {}
    for rank, (file, parts) in enumerate(zip(names, told, strict=True)):
        targets.append([])
        for name, (shape, dtype), region in parts:
            number = seen[file, name]  # further parts of a tensor in one file are NAME@1, NAME@2, ...
            seen[file, name] += 1
            path = f"{name}@{number}" if number else name
            targets[-1].append(Dataset(path, region.count, dtype, region.start, shape))
            tensors[name].append((file, targets[-1][-1]))
        if parts:
            makers.setdefault(file, rank)
            contents.setdefault(file, []).extend(targets[-1])
    made = []
    for rank, file in enumerate(names):
        lays_out = makers.get(file) == rank
        own = storage, file, told[rank], targets[rank], lays_out, contents[file] if lays_out else ()
        made.append(Plan(*own) if rank else Plan(*own, kinds, tensors))
    return made


def _whole(storage: str, kinds: Mapping[str, Kind], told: Sequence[Sequence[Place]]) -> list[Plan]:
    """One file, in which every tensor is a dataset, laid out by rank 0."""
    datasets = {name: Dataset(name, shape, dtype, (0,) * len(shape), shape) for name, (shape, dtype) in kinds.items()}
    rounds = _rounds(datasets, told) if storage == "mpio" else {}
    every = list(datasets.values())
    made = []
    for rank, parts in enumerate(told):
        own = storage, WHOLE, parts, [datasets[name] for name, _, _ in parts]
        made.append(Plan(*own, False, rounds=rounds) if rank else Plan(*own, True, every, kinds, rounds=rounds))
    return made


def _rounds(datasets: Mapping[str, Dataset], told: Sequence[Sequence[Place]]) -> dict[str, int]:
    """The tensors that MPI-IO should collect before they are written, since a part of one is no single run of bytes,
    and how many blocks of one any rank has."""
    counts: dict[str, Counter[int]] = {}
    scattered = set()
    for rank, parts in enumerate(told):
        for name, (shape, dtype), region in parts:
            if math.prod(region.count[: run_axis(shape, region.count)]) > 1:
                scattered.add(name)
            blocks = sum(1 for _ in region.blocks(on_disk(dtype).itemsize))
            counts.setdefault(name, Counter())[rank] += blocks
    return {name: max(counts[name].values()) for name in datasets if name in scattered}
