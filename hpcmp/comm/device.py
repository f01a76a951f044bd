"""Which GPU each rank computes on."""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..arrays import module_for
from ..errors import InputError

log = logging.getLogger("hpcmp")


@dataclass(frozen=True)
class Device:
    """A rank's GPU: ``index`` as CUDA numbers those that it sees. shared: whether any ranks of the job share a GPU."""

    index: int
    name: str
    shared: bool

    @property
    def nccl(self) -> bool:
        """Whether NCCL connects the ranks: where some share a GPU, only if NCCL_MULTI_RANK_GPU_ENABLE=1 (2.30.3)."""
        return not self.shared or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"


def select_device(rank: int, gather: Callable[[Any], list[Any]]) -> Device:
    """Make a GPU of its own current on each rank; ``gather`` is ``Mesh.gather_objects``. Collective.

    Ranks choose in order, each the first of the GPUs that it sees which the fewest ranks have chosen before: by local
    rank where all of a host's ranks see all of its GPUs, and as the launcher binds them where it does.

    Raises InputError, the same on every rank, if CuPy or a GPU is missing anywhere, or if ranks would share a GPU and
    no rank has HPCMP_SHARE_GPU=1 in its environment.
    """
    host, seen, name, problem = socket.gethostname(), [""], "", ""
    try:
        seen = visible(host)
    except InputError as error:
        problem = str(error)
    ranks = gather((host, seen, problem, os.environ.get("HPCMP_SHARE_GPU") == "1"))
    for other, (where, _, why, _) in enumerate(ranks):
        if why:
            raise InputError(f"{why} (rank {other} on host {where})")
    chosen = assign([gpus for _, gpus, _, _ in ranks])
    holders = Counter(gpus[i] for (_, gpus, _, _), i in zip(ranks, chosen, strict=True))
    shared = max(holders.values()) > 1
    if shared and not any(share for *_, share in ranks):
        raise InputError(_crowded(ranks, chosen, holders))
    index = chosen[rank]
    cuda = module_for("cuda").cuda
    cuda.Device(index).use()
    name = cuda.runtime.getDeviceProperties(index)["name"].decode()
    log.info("rank %d: GPU %d of the %d that it sees on %s, %s", rank, index, len(seen), host, name)
    if shared and rank == 0:
        log.warning("%d ranks share %d GPUs (HPCMP_SHARE_GPU=1)", len(ranks), len(holders))
    return Device(index, name, shared)


def assign(visible: Sequence[Sequence[str]]) -> list[int]:
    """For each rank the index, among the GPUs that it sees, of the first which the fewest ranks before it have."""
    taken: Counter[str] = Counter()
    chosen = []
    for gpus in visible:
        index = min(range(len(gpus)), key=lambda i: taken[gpus[i]])
        taken[gpus[index]] += 1
        chosen.append(index)
    return chosen


def visible(host: str) -> list[str]:
    """A name for each GPU that this process sees, the same in every process of the host that sees it."""
    runtime = module_for("cuda").cuda.runtime
    indices = range(runtime.getDeviceCount())
    # Slices of one GPU (MIG) have its bus id in common.
    return [f"{host} {runtime.deviceGetPCIBusId(i)} {runtime.getDeviceProperties(i)['uuid']!r}" for i in indices]


def _crowded(ranks: list[Any], chosen: list[int], holders: Counter[str]) -> str:
    """What is wrong on the first host where ranks would share a GPU."""
    host = next(r[0] for r, i in zip(ranks, chosen, strict=True) if holders[r[1][i]] > 1)
    here = [(gpus, i) for (where, gpus, _, _), i in zip(ranks, chosen, strict=True) if where == host]
    gpus = len({gpus[i] for gpus, i in here})
    return (
        f"{len(here)} ranks on host {host} have {gpus} GPU{'s' * (gpus > 1)}: start at most one rank a GPU, "
        "or set HPCMP_SHARE_GPU=1 to let them share"
    )
