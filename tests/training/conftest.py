"""What several tests of runs share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.corpus import config, corpus

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


@pytest.fixture
def toml(world: Intracomm, mpi_tmp_path: Path) -> Path:
    """The configuration of a tiny run beside its data, the same file on every rank."""
    if world.rank == 0:
        config(mpi_tmp_path, corpus(mpi_tmp_path))
    world.Barrier()
    return mpi_tmp_path / "tiny.toml"
