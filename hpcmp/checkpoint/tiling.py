"""What is going to be saved: this rank's slabs, and the tensors that those of all ranks make up."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from ..errors import HpcmpError
from .agree import agreed, gather, scatter
from .manifest import DTYPES, TENSOR
from .plan import Kind, Place, Plan, plans
from .slab import Region, Slab, check_tiling

if TYPE_CHECKING:
    from ..comm.mesh import Mesh


def in_order(slabs: Iterable[Slab]) -> list[Slab]:
    """The slabs that are not empty, in the order of their names. Raises ValueError for one that cannot be saved."""
    parts = [(slab, region) for slab in slabs if (region := slab.region())]
    for slab, _ in parts:
        if not TENSOR.fullmatch(slab.name):
            raise ValueError(f"{slab.name!r} cannot be a tensor's name: words of A-Z a-z 0-9 _ . - joined by /")
        if slab.data.dtype.name not in DTYPES:
            raise ValueError(f"{slab.name}: dtype {slab.data.dtype} cannot be saved; these can: {', '.join(DTYPES)}")
    return [slab for slab, _ in sorted(parts, key=lambda part: (part[0].name, part[1].start))]


def make_plan(
    slabs: Sequence[Slab], storage: str, mesh: Mesh, last: Plan | None, failed: Callable[[str, str], HpcmpError]
) -> Plan:
    """This rank's plan for slabs that are ``in_order``: ``last``, if these lie on every rank as the slabs of that did.

    Collective. Raises ``failed``, the same on all ranks, if the slabs of all ranks do not tile every tensor once.
    """
    places = [_place(slab) for slab in slabs]
    again = all(mesh.gather_objects(last is not None and last.storage == storage and last.places == places))
    if last is not None and again:
        return last
    told = gather(mesh, places)
    made: list[Plan] = []
    with agreed(mesh, failed):
        if mesh.rank == 0:
            made = plans(storage, _tensors(told), told, mesh.topology.nodes)
    plan: Plan = scatter(mesh, made)
    return plan


def _place(slab: Slab) -> Place:
    region = slab.region()
    assert region is not None  # it is not empty
    return slab.name, (tuple(map(int, slab.shape)), slab.data.dtype.name), region


def _tensors(told: Sequence[Sequence[Place]]) -> dict[str, Kind]:
    """The tensors that the ranks' parts make up, in the order of their names; ValueError if they do not."""
    kinds: dict[str, Kind] = {}
    regions: dict[str, list[Region]] = {}
    for rank, places in enumerate(told):
        for name, kind, region in places:
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
