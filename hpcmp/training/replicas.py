"""Whether ranks that hold equal copies of the weights still do: silent corruption of memory or a device shows here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from ..arrays import Array, to_host
from ..checkpoint.digest import running
from ..comm.base import Communicator
from ..comm.check import ranks_text
from ..comm.mesh import Mesh
from ..errors import HpcmpError
from ..module import Index
from .engine import Engine

_MOST = 3  # tensors that an error names
Key = tuple[str, tuple[int, ...]]  # a tensor's name, and which part of it


class ReplicaError(HpcmpError):
    """Ranks that hold the same part of a weight, or of the optimizer's state, hold different numbers."""


def check_replicas(engine: Engine, step: int) -> None:
    """Raise ReplicaError, the same on every rank, naming tensors and ranks, if copies differ after ``step`` steps.

    Compared are the weights that layers use, and master weights and states of the optimizer where they are not sharded
    over all (ZeRO), between all ranks that hold the same part: replicas, and within a replica what tensor parallelism
    or tied weights repeat. Where more than two ranks hold it, those with the rarest numbers are named. Each rank reads
    all that it holds once (xxh3), and sends 8 bytes a tensor over replicas, 16 within one. Collective over the mesh.
    """
    mesh, held = engine.mesh, list(_held(engine))
    digests = [_digest(array) for _, _, array in held]
    equal = all([_over_replicas(held, digests), _within_a_replica(mesh, held, digests)])  # both are collective
    if not mesh[Mesh.axes].all_reduce(np.array([float(not equal)])).wait()[0]:
        return
    mine = {key: digest for (key, _, _), digest in zip(held, digests, strict=True)}
    told = _describe(mesh.gather_objects(mine))
    raise ReplicaError(f"after step {step} copies differ: {told}: look at that rank's memory or device")


def _held(engine: Engine) -> Iterator[tuple[Key, Communicator, Array]]:
    """(key, the replicas that hold the same, array) of all that this rank holds besides others."""
    for bucket in engine.buckets.buckets:
        if bucket.zero < 3:
            copies = engine.mesh[bucket.parameters[0].replicas]
            for p, view in zip(bucket.parameters, bucket.views(bucket.data), strict=True):
                yield (f"model/{p.name}", _ends(p.index)), copies, view
        if not bucket.view:
            for piece in bucket.pieces():
                p, place = piece.parameter, (piece.start, piece.stop)
                yield (f"master/{p.name}", (*place, *_ends(p.index))), bucket.replicas, bucket.master[piece.place]
    copies_of = {id(p): bucket.replicas for bucket in engine.buckets.buckets for p in bucket.parameters}
    for kind, piece, array in engine.optimizer.state():
        p, place = piece.parameter, (piece.start, piece.stop)
        yield (f"optimizer/{kind}/{p.name}", (*place, *_ends(p.index))), copies_of[id(p)], array


def _ends(index: Index) -> tuple[int, ...]:
    return tuple(end for s in index for end in (s.start, s.stop))


def _digest(array: Array) -> int:
    """64 bits of the numbers' bits."""
    digest = running("xxh3_64")
    digest.update(np.ascontiguousarray(to_host(array)).reshape(-1).view(np.uint8))
    return int(digest.hexdigest(), 16)


def _over_replicas(held: list[tuple[Key, Communicator, Array]], digests: list[int]) -> bool:
    """Whether each group of replicas has the same digests, which all its ranks have in the same order."""
    groups: dict[int, tuple[Communicator, list[int]]] = {}
    for (_, copies, _), digest in zip(held, digests, strict=True):
        groups.setdefault(id(copies), (copies, []))[1].append(digest)
    equal = True
    for copies, mine in groups.values():
        both = np.array([mine, [~digest & 0xFFFFFFFFFFFFFFFF for digest in mine]], np.uint64)
        most, least = copies.all_reduce(both, "max").wait()
        equal &= bool((most == ~least).all())
    return equal


def _within_a_replica(mesh: Mesh, held: list[tuple[Key, Communicator, Array]], digests: list[int]) -> bool:
    """Whether the ranks that hold one model have the same digests wherever they hold the same."""
    group = mesh["pp", "tp_y", "tp"]
    if group.size == 1:
        return True
    mine = np.array([(_number(key), digest) for (key, _, _), digest in zip(held, digests, strict=True)], np.uint64)
    mine = mine.reshape(-1, 2)
    counts = group.all_gather(np.array([len(mine)])).wait().tolist()
    table = np.unique(group.all_gather_v(mine, counts).wait(), axis=0)
    return len(np.unique(table[:, 0])) == len(table)


def _number(key: Key) -> int:
    digest = running("xxh3_64")
    digest.update(repr(key).encode())
    return int(digest.hexdigest(), 16)


def _describe(ranks: list[dict[Key, int]]) -> str:
    """Which tensors differ, and on which ranks."""
    holders: dict[Key, list[tuple[int, int]]] = {}
    for rank, mine in enumerate(ranks):
        for key, digest in mine.items():
            holders.setdefault(key, []).append((rank, digest))
    told: dict[str, list[str]] = {}
    for (name, _), found in holders.items():
        counts = Counter(digest for _, digest in found)
        if len(counts) == 1:
            continue
        (usual, most), (_, second) = counts.most_common(2)
        if most > second:
            odd = ranks_text([rank for rank, digest in found if digest != usual])
            text = f"on {odd} not as on the other {most} that hold it"
        else:
            text = f"on {ranks_text([rank for rank, _ in found])}, of which nothing tells which is right"
        told.setdefault(text, []).append(name)
    lines = []
    for text, names in told.items():
        more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
        lines.append(f"{', '.join(names[:_MOST])}{more} {text}")
    return "; ".join(lines)
