"""A rank's share of a checkpoint: written, forced to the disk, read back, and described for the manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import mpio, reader, writer
from .manifest import DataFile, Manifest, Piece, Tensor
from .plan import WHOLE, Plan
from .slab import Slab
from .storage import Storage

if TYPE_CHECKING:
    from ..comm.mesh import Mesh

Written = tuple[dict[str, DataFile], list[tuple[str, Piece]]]  # by one rank: the files it laid out, its pieces


def lay_out(folder: Path, plan: Plan, storage: Storage) -> None:
    """Create the files in ``folder`` that are this rank's to lay out: full length, no numbers. Raises OSError."""
    if plan.lays_out:
        writer.lay_out(folder / plan.file, plan.datasets, storage.block(folder))
    if plan.tensors is not None:
        writer.lay_out_tensors(folder / WHOLE, plan.tensors)


def write(
    folder: Path, plan: Plan, slabs: Sequence[Slab], storage: Storage, mesh: Mesh | None, at: Callable[[str], None]
) -> Written:
    """Write this rank's slabs (``plan.places``) to its file, which is laid out, and read them back.

    mesh: of the ranks that write together, if ``plan.collective``; else no call of MPI is made. Raises OSError, also if
    something does not read back as it was written.
    """
    pieces: list[tuple[str, Piece]] = []
    path = folder / plan.file
    if slabs or plan.collective:
        places = zip(plan.targets, slabs, plan.places, strict=True)
        parts = [(target, slab, region) for target, slab, (_, _, region) in places]
        if plan.collective and mesh is not None and mesh.comm is not None:
            digests = mpio.write(path, parts, plan.rounds, storage, mesh, at)
        else:
            digests = writer.write(path, parts, at, storage.verify)
        for (target, slab, region), digest in zip(parts, digests, strict=True):
            pieces.append((slab.name, Piece(plan.file, target.path, region.start, region.count, digest)))
    files = {plan.file: reader.measure(path, [item.path for item in plan.datasets])} if plan.lays_out else {}
    if plan.tensors is not None:
        files[WHOLE] = reader.measure(folder / WHOLE, [])
    return files, pieces


def manifest(
    step: int, plan: Plan, gathered: Sequence[Written], state: dict[str, Any], taken: datetime | None = None
) -> Manifest:
    """The manifest of what all ranks have written. plan: rank 0's. taken: when the arrays were so, by default now."""
    pieces: dict[str, list[Piece]] = {name: [] for name in plan.kinds}
    files: dict[str, DataFile] = {}
    for facts, pairs in gathered:
        files |= facts
        for name, piece in pairs:
            pieces[name].append(piece)
    tensors = {name: Tensor(*kind, tuple(pieces[name])) for name, kind in plan.kinds.items()}
    saved = (taken or datetime.now(UTC)).isoformat(timespec="microseconds")
    return Manifest(step, saved, plan.storage, files, tensors, state)
