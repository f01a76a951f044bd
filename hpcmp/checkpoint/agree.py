"""Failing together: what goes wrong on one rank is raised on all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import HpcmpError, reason

if TYPE_CHECKING:
    from ..comm.mesh import Mesh

__all__ = ["agreed", "broadcast", "gather", "reason", "scatter"]


@contextmanager
def agreed(mesh: Mesh | None, failed: Callable[[str, str], HpcmpError]) -> Iterator[None]:
    """Run the body on every rank; if it raises on any, raise ``failed(who, why)``, the same everywhere.

    Collective. The body must not wait for another rank after a point where it may raise. ``who`` is "" in a serial run.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    why = reason(failure) if failure else None
    whys = [why] if mesh is None else mesh.gather_objects(why)
    found = [(rank, text) for rank, text in enumerate(whys) if text is not None]
    if found:
        rank, text = found[0]
        others = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise failed(f"rank {rank}{others}: " if len(whys) > 1 else "", text) from failure


def broadcast(mesh: Mesh | None, value: Any, root: int = 0) -> Any:
    """The value of rank ``root``, on every rank."""
    if mesh is None or mesh.comm is None:
        return value
    with mesh.flight.blocking("broadcast of an object", root):
        return mesh.comm.bcast(value, root)


def gather(mesh: Mesh, value: Any) -> list[Any]:
    """The values of all ranks on rank 0, and an empty list on the others."""
    if mesh.comm is None:
        return [value]
    with mesh.flight.blocking("gather of objects", 0):
        return mesh.comm.gather(value) or []


def scatter(mesh: Mesh, values: list[Any]) -> Any:
    """This rank's of rank 0's values, of which there is one for each rank; what others pass is ignored."""
    if mesh.comm is None:
        return values[0]
    with mesh.flight.blocking("scatter of objects", 0):
        return mesh.comm.scatter(values if mesh.rank == 0 else None)
