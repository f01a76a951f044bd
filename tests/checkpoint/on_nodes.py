"""A local tier on nodes that one machine plays: each has a folder, and HPCMP_NODES says which rank is on which."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hpcmp.checkpoint.tier import LocalTier
from hpcmp.comm.mesh import Mesh
from tests.checkpoint.cases import STATE, owned

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

#: The node of each rank, for each number of ranks.
NODES = {1: "0", 2: "0,1", 3: "0,0,1", 4: "0,0,1,1", 8: "0,0,1,1,2,2,3,3"}


@contextmanager
def tier(
    world: Intracomm, folder: Path, run: str = "this", nodes: str | None = None, **axes: int
) -> Iterator[LocalTier]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPCMP_NODES", nodes or NODES[world.size])
        with Mesh(world, **(axes or {"tp": world.size})) as mesh:
            yield LocalTier(f"{folder}/node{{node}}", run, mesh)


def save(made: LocalTier, *steps: int) -> bool:
    """Save version n at step n."""
    done = [made.save(step, owned(made.mesh, step), STATE) for step in steps]
    return all(done)


def nodes(world: Intracomm) -> list[int]:
    return sorted(set(map(int, NODES[world.size].split(","))))


def alone(world: Intracomm, act: Callable[[], Any]) -> None:
    """One rank does something to the disks, between what all do."""
    world.Barrier()
    if world.rank == 0:
        act()
    world.Barrier()


def stored(folder: Path, node: int, run: str = "this") -> dict[str, list[str]]:
    """Step -> the files of it on a node."""
    root = folder / f"node{node}" / run
    return {path.name[:13]: sorted(p.name for p in path.iterdir()) for path in sorted(root.glob("*"))}
