"""Whether all ranks of a run were started alike: one configuration, one seed, one hpcmp."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..comm.check import ranks_text
from ..errors import InputError
from ..kernels.cuda import choices

if TYPE_CHECKING:
    from mpi4py import MPI

    from ..comm.mesh import Mesh
    from .config import Config
    from .inputs import Inputs

_MOST = 5  # differences that are told


def check_alike(config: Config, comm: MPI.Intracomm | None) -> None:
    """Raise InputError, the same on every rank, that names each difference and its ranks, unless all ranks have one
    ``config`` (the seed is in it) and one hpcmp. Collective over ``comm``, which is duplicated; ranks send 16 bytes
    each unless they differ."""
    if comm is None or comm.size == 1:
        return
    from ..comm.survive import hold

    mine = {f"{section}.{key}": value for section, table in config.to_dict().items() for key, value in table.items()}
    mine |= {"hpcmp": code(), "HPCMP_GEMM_CHOICES": choices.digest()}
    text = repr(sorted(mine.items()))
    own = hold(comm.Dup())
    try:
        digests = own.allgather(hashlib.blake2b(text.encode(), digest_size=16).digest())
        found = own.allgather(mine) if len(set(digests)) > 1 else []
    finally:
        own.Free()
    if found:
        raise InputError(f"the ranks were started with different settings: {differences(found)}")


def check_data(inputs: Inputs, mesh: Mesh) -> None:
    """Raise InputError, the same on every rank, unless all ranks have opened the same tokens, by their digests: a path
    may lead to another file on each node. Collective."""
    splits = {name: inputs.file.split(name).digest for name in ("train", "valid")}
    found = mesh.gather_objects(splits)
    if any(one != splits for one in found):
        raise InputError(f"{inputs.file.path} is not the same file on every rank: {differences(found)}")


def differences(found: list[dict[str, Any]]) -> str:
    """What differs in ``found``, one dictionary a rank: each key, its values, and the ranks that have them."""
    told = []
    for key in dict.fromkeys(key for one in found for key in one):
        values: dict[str, list[int]] = {}
        for rank, one in enumerate(found):
            values.setdefault(repr(one.get(key)), []).append(rank)
        if len(values) > 1:
            told.append(f"{key} is " + ", ".join(f"{value} on {ranks_text(ranks)}" for value, ranks in values.items()))
    more = f"; and {len(told) - _MOST} keys more" if len(told) > _MOST else ""
    return "; ".join(told[:_MOST]) + more


@functools.cache
def code() -> str:
    """Which hpcmp this process runs: ``0.1.0, sources 1f2e...``, a digest over the sources as they are installed."""
    root, digest = Path(__file__).parents[1], hashlib.blake2b(digest_size=8)
    for path in sorted(p for suffix in ("py", "cu", "cuh", "toml") for p in root.rglob(f"*.{suffix}")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return f"{__version__}, sources {digest.hexdigest()}"
