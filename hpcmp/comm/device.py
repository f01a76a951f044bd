"""Which GPU each rank computes on."""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..arrays import module_for
from ..batch import launcher
from ..errors import InputError
from ..kernels.cuda import libraries
from .lanes import nccl_version

log = logging.getLogger("hpcmp")

_SHARING = 23003  # NCCL 2.30.3, the first that connects ranks which share a GPU


@dataclass(frozen=True)
class Device:
    """A rank's GPU: ``index`` as CUDA numbers those that it sees. shared: whether any ranks of the job share a GPU, or
    have slices of one (MIG). together: whether NCCL connects those, too. The last two are the same on every rank."""

    index: int
    name: str
    shared: bool
    together: bool = False

    @property
    def nccl(self) -> bool:
        """Whether NCCL connects the ranks."""
        return not self.shared or self.together


class Told(NamedTuple):
    """What a rank tells the others: its host, the GPUs that it sees, why it has none, whether ranks may share one and
    whether its NCCL then connects them, its number on its host, if the launcher says it."""

    host: str
    seen: list[str]
    problem: str
    share: bool
    together: bool
    local: int | None


def select_device(rank: int, gather: Callable[[Any], list[Any]]) -> Device:
    """Make a GPU of its own current on each rank; ``gather`` is ``Mesh.gather_objects``. Collective.

    Ranks choose in the order of their numbers on their hosts, as the launcher says them, see ``assign``: the GPU of the
    local rank where all of a host's ranks see all of its GPUs, and one of those that the launcher binds them to where
    it does.

    Raises InputError, the same on every rank, if CuPy or a GPU is missing anywhere, or if ranks would share a GPU and
    no rank has HPCMP_SHARE_GPU=1 in its environment.
    """
    host, started, seen, together, problem = socket.gethostname(), launcher(), [""], False, ""
    local = started.local_rank if started else None
    try:
        seen, together = visible(host), _together()
    except InputError as error:
        problem = str(error)
    ranks: list[Told] = gather(Told(host, seen, problem, os.environ.get("HPCMP_SHARE_GPU") == "1", together, local))
    for other, each in enumerate(ranks):
        if each.problem:
            raise InputError(f"{each.problem} (rank {other} on host {each.host})")
    chosen = assign([each.seen for each in ranks], [each.local for each in ranks])
    taken = [each.seen[index] for each, index in zip(ranks, chosen, strict=True)]
    holders = Counter(taken)
    cards = Counter(_card(each.host, gpu) for each, gpu in zip(ranks, taken, strict=True))
    crowded = max(holders.values()) > 1
    if crowded and not any(each.share for each in ranks):
        raise InputError(_crowded(ranks, taken, holders))
    index = chosen[rank]
    cuda = module_for("cuda").cuda
    cuda.Device(index).use()
    name = cuda.runtime.getDeviceProperties(index)["name"].decode()
    place = "" if started is None or local is None else f" (local rank {local} of {started.name})"
    log.info("rank %d%s: GPU %d of the %d that it sees on %s, %s", rank, place, index, len(seen), host, name)
    if rank == 0:
        log.info("%s", libraries.said())
    if crowded and rank == 0:
        log.warning("%d ranks share %d GPUs (HPCMP_SHARE_GPU=1)", len(ranks), len(holders))
    together = all(each.together for each in ranks) and not any("MIG-" in gpu for gpu in taken)
    return Device(index, name, max(cards.values()) > 1, together)


def assign(visible: Sequence[Sequence[str]], local: Sequence[int | None] = ()) -> list[int]:
    """For each rank the index, among the GPUs that it sees, of its own.

    As many ranks as can have one to themselves: the first that is free, and if none is, one whose holder can take
    another instead. What is left over shares evenly. Ranks choose in the order of their ``local`` numbers on their
    hosts, as the launcher says them; where it does not, in their own.
    """
    numbers = [rank if number is None else number for rank, number in enumerate(local or [None] * len(visible))]
    order = sorted(range(len(visible)), key=lambda rank: (numbers[rank], rank))
    chosen: dict[int, int] = {}
    holder: dict[str, int] = {}

    def take(rank: int, refused: set[str]) -> bool:
        free = [i for i, gpu in enumerate(visible[rank]) if gpu not in holder]
        for i in [*free, *range(len(visible[rank]))]:
            gpu = visible[rank][i]
            if gpu in refused:
                continue
            refused.add(gpu)
            if gpu not in holder or take(holder[gpu], refused):
                chosen[rank], holder[gpu] = i, rank
                return True
        return False

    left = [rank for rank in order if not take(rank, set())]
    taken = Counter(visible[rank][i] for rank, i in chosen.items())
    for rank in left:
        gpus = visible[rank]
        chosen[rank] = min(range(len(gpus)), key=lambda i: taken[gpus[i]])
        taken[gpus[chosen[rank]]] += 1
    return [chosen[rank] for rank in range(len(visible))]


def visible(host: str) -> list[str]:
    """A name for each GPU, or slice of one (MIG), that this process sees, the same in every process that sees it.

    It is of the bus id, which slices of a GPU have in common, and the uuid, by which GPUs differ everywhere: two
    containers of one node may have two host names. ``host`` tells apart those that have no uuid, as some virtual ones.
    """
    runtime = module_for("cuda").cuda.runtime
    slices = _slices()
    names = []
    for i in range(runtime.getDeviceCount()):
        uuid = bytes(runtime.getDeviceProperties(i)["uuid"])
        facts = runtime.deviceGetPCIBusId(i), uuid.hex() if any(uuid) else host, *slices[i : i + 1]
        names.append(" ".join(filter(None, facts)))
    return names


def _together() -> bool:
    """Whether NCCL connects ranks of this host that share a GPU: from 2.30.3 on, if it is told to."""
    return os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1" and nccl_version() >= _SHARING


def _slices() -> list[str]:
    """The uuids of the slices that this process was given, by index, and "" for whole GPUs. Of one that is not named by
    its uuid CUDA tells the GPU's alone."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("NVIDIA_VISIBLE_DEVICES") or ""
    return [each.strip() if each.strip().startswith("MIG-") else "" for each in shown.split(",")]


def _card(host: str, gpu: str) -> str:
    """A name that slices of one GPU have in common."""
    return f"{host} {gpu.split()[0]}" if "MIG-" in gpu else gpu


def _crowded(ranks: list[Told], taken: list[str], holders: Counter[str]) -> str:
    """What is wrong on the first host where ranks would share a GPU."""
    host = next(rank.host for rank, gpu in zip(ranks, taken, strict=True) if holders[gpu] > 1)
    here = [gpu for rank, gpu in zip(ranks, taken, strict=True) if rank.host == host]
    gpus = len(set(here))
    return (
        f"{len(here)} ranks on host {host} have {gpus} GPU{'s' * (gpus > 1)}: start at most one rank a GPU, "
        "or set HPCMP_SHARE_GPU=1 to let them share"
    )
