"""Saving a checkpoint: all of it, or nothing that anyone could mistake for one."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import HpcmpError, InputError
from . import directory, reader, writer
from .agree import agreed, broadcast, gather
from .manifest import DTYPES, TENSOR, DataFile, Manifest, Piece, Tensor
from .slab import Region, Slab, check_tiling
from .writer import Dataset

if TYPE_CHECKING:
    from ..comm.mesh import Mesh

Storage = Literal["auto", "files", "mpio"]
Kind = tuple[tuple[int, ...], str]  # a tensor's shape and dtype
Part = tuple[Slab, Region]
Written = tuple[str, DataFile | None, list[tuple[str, Piece]]]  # by one rank: file name, facts of the file, pieces
SHARED = "tensors.h5"


class CheckpointSaveError(HpcmpError):
    """A checkpoint could not be written, on every rank alike; the message names rank, file and reason.

    What was written of it is removed, and every earlier checkpoint is as it was.
    """


def save(
    root: Path | str,
    step: int,
    slabs: Iterable[Slab],
    state: dict[str, Any],
    mesh: Mesh,
    *,
    storage: Storage = "auto",
    keep: int | None = 2,
) -> Path:
    """Save ``slabs`` and ``state`` as ``root/step_<step>``; returns that path. Collective.

    slabs: what this rank writes. Over all ranks the slabs of a name tile its shape exactly once; empty ones are
    dropped, and a rank may have none. state: anything JSON can hold, the same on all ranks (rank 0's is stored).
    storage: "files", a file per rank (what "auto" means); "mpio", one file written by all through MPI-IO. keep: how
    many checkpoints stay, this one included; None for all. A checkpoint of the same step is replaced.

    The order of things is in docs/checkpoints.md: a crash at any moment leaves this checkpoint or the one before it.
    Raises CheckpointSaveError, the same on all ranks; InputError for a wrong ``storage`` or ``keep``.
    """
    root, step = Path(root), int(step)
    shared = _is_shared(storage, mesh)
    if step < 0 or (keep is not None and keep < 1):
        raise InputError(f"a checkpoint's step must be 0 or more and keep at least 1: step={step}, keep={keep}")
    final = root / directory.step_name(step)
    at = partial(directory.failpoint, rank=mesh.rank)

    def failed(who: str, why: str) -> CheckpointSaveError:
        return CheckpointSaveError(f"{root}: step {step} is not saved: {who}{why}")

    temporary: Path | None = None
    kinds: dict[str, Kind] = {}
    try:
        with agreed(mesh, failed):
            parts = _parts(slabs)
            json.dumps(state, sort_keys=True)
        told = gather(mesh, [(slab.name, _kind(slab), region) for slab, region in parts])
        with agreed(mesh, failed):
            if mesh.rank == 0:
                kinds = _check(told)
                temporary = directory.begin(root, step)
            at("create")
        temporary, kinds = broadcast(mesh, (temporary, kinds))
        path = Path(temporary or "", SHARED if shared else f"rank_{mesh.rank:05d}.h5")
        with agreed(mesh, failed):
            datasets = _shared_datasets(kinds) if shared else _own_datasets(parts)
            lays_out = mesh.rank == 0 if shared else bool(parts)
            if lays_out:
                writer.lay_out(path, datasets)
        with agreed(mesh, failed):
            written = _write(path, parts, datasets, mesh, at, shared)
        gathered = gather(mesh, written)
        with agreed(mesh, failed):
            if mesh.rank == 0 and temporary:
                text = _manifest(step, "mpio" if shared else "files", kinds, gathered, state).render()
                directory.commit(temporary, final, text, at)
        at("prune")
        if mesh.rank == 0 and keep is not None:
            directory.prune(root, keep, final)
    except CheckpointSaveError:
        if mesh.rank == 0 and temporary and temporary.exists():
            directory.discard(temporary)
        raise
    return final


def _is_shared(storage: str, mesh: Mesh) -> bool:
    if storage not in ("auto", "files", "mpio"):
        raise InputError(f"unknown storage {storage!r} of a checkpoint: it is auto, files or mpio")
    if storage != "mpio":
        return False
    import h5py

    if mesh.comm is not None and not h5py.get_config().mpi:
        raise InputError("storage mpio needs an h5py that was built with MPI; storage files works with any")
    return True


def _parts(slabs: Iterable[Slab]) -> list[Part]:
    """The slabs that are not empty, checked, in the order of their names."""
    parts = [(slab, region) for slab in slabs if (region := slab.region())]
    for slab, _ in parts:
        if not TENSOR.fullmatch(slab.name):
            raise ValueError(f"{slab.name!r} cannot be a tensor's name: words of A-Z a-z 0-9 _ . - joined by /")
        if slab.data.dtype.name not in DTYPES:
            raise ValueError(f"{slab.name}: dtype {slab.data.dtype} cannot be saved; these can: {', '.join(DTYPES)}")
    return sorted(parts, key=lambda part: (part[0].name, part[1].start))


def _kind(slab: Slab) -> Kind:
    return tuple(map(int, slab.shape)), slab.data.dtype.name


def _check(told: Sequence[Sequence[tuple[str, Kind, Region]]]) -> dict[str, Kind]:
    """The tensors that the ranks' slabs make up, in order of their names; ValueError if they do not."""
    kinds: dict[str, Kind] = {}
    regions: dict[str, list[Region]] = {}
    for rank, slabs in enumerate(told):
        for name, kind, region in slabs:
            if kinds.setdefault(name, kind) != kind:
                raise ValueError(
                    f"{name}: {kind[1]} {kind[0]} on rank {rank}, {kinds[name][1]} {kinds[name][0]} before it"
                )
            regions.setdefault(name, []).append(region)
    for name, parts in regions.items():
        try:
            check_tiling(kinds[name][0], parts)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        for parent in itertools.accumulate(name.split("/")[:-1], "{}/{}".format):
            if parent in kinds:
                raise ValueError(f"{parent} is a tensor, so that {name} cannot be one")
    return dict(sorted(kinds.items()))


def _write(
    path: Path, parts: Sequence[Part], datasets: Sequence[Dataset], mesh: Mesh, at: Callable[[str], None], shared: bool
) -> Written:
    """Write this rank's parts, read them back, and say what the manifest needs to know."""
    if not parts and not shared:
        return path.name, None, []
    by_name = {item.path: item for item in datasets}
    targets = [by_name[slab.name] for slab, _ in parts] if shared else datasets
    pairs = [(target, slab, region) for target, (slab, region) in zip(targets, parts, strict=True)]
    digests = writer.write(path, pairs, mesh.comm if shared else None, at)
    at("digest")
    pieces = []
    with reader.OpenFile(path) as file:
        for (target, slab, region), digest in zip(pairs, digests, strict=True):
            if file.digest(target.path, target.shape, target.dtype, target.origin, region) != digest:
                raise OSError(f"{path}: {slab.name} does not read back as it was written")
            pieces.append((slab.name, Piece(path.name, target.path, region.start, region.count, digest)))
    facts = None if shared and mesh.rank else reader.measure(path, [item.path for item in datasets])
    return path.name, facts, pieces


def _shared_datasets(kinds: dict[str, Kind]) -> list[Dataset]:
    """A dataset for each tensor, whole."""
    return [Dataset(name, shape, dtype, (0,) * len(shape), shape) for name, (shape, dtype) in kinds.items()]


def _own_datasets(parts: Sequence[Part]) -> list[Dataset]:
    """A dataset for each part: named after its tensor, and @1, @2, ... for further parts of the same one."""
    seen: Counter[str] = Counter()
    datasets = []
    for slab, region in parts:
        path = f"{slab.name}@{seen[slab.name]}" if seen[slab.name] else slab.name
        seen[slab.name] += 1
        shape, dtype = _kind(slab)
        datasets.append(Dataset(path, region.count, dtype, region.start, shape))
    return datasets


def _manifest(step: int, storage: str, kinds: dict[str, Kind], gathered: Sequence[Written], state: Any) -> Manifest:
    pieces: dict[str, list[Piece]] = {name: [] for name in kinds}
    for _, _, pairs in gathered:
        for name, piece in pairs:
            pieces[name].append(piece)
    files = {name: facts for name, facts, _ in gathered if facts}
    tensors = {name: Tensor(*kind, tuple(pieces[name])) for name, kind in kinds.items()}
    saved = datetime.now(UTC).isoformat(timespec="microseconds")
    return Manifest(step, saved, storage, files, tensors, state)
