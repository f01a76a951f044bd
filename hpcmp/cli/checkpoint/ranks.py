"""The ranks of an action that shares its work among those that mpirun started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...comm.mesh import Mesh


@contextmanager
def all_ranks() -> Iterator[Mesh]:
    """A mesh of all ranks, or of this process alone."""
    from ...comm.mesh import Mesh
    from ..world import world

    comm = world()
    with Mesh(comm, dp=1 if comm is None else comm.size) as mesh:
        yield mesh
