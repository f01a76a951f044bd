"""What MPI has for the loss of ranks, on ranks that are lost, and on ranks of which none is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hpcmp.comm import base
from hpcmp.comm.base import Pending
from hpcmp.comm.mesh import Mesh

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.timeout(120)

#: Rank 2 of 4 dies while 0 waits for 1, which waits for 2; 3 does nothing. Who is left counts what is left.
PROGRAM = """
import os, signal, sys
import numpy as np
from hpcmp.comm.detect import alone, start_mpi
MPI = start_mpi()
from hpcmp.comm import base
from hpcmp.comm.mesh import Mesh
from hpcmp.comm.survive import Survivors, free, is_loss, missing, revoke
assert missing() == ""
world = MPI.COMM_WORLD
survivors = Survivors(world)
me = world.rank
well = True
if me < 3:
    mesh = Mesh(survivors.group([0, 1, 2]), dp=3, shared_memory="no")
    dp = mesh["dp"]
    dp.all_reduce(np.ones(4)).wait()
    try:
        if me == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        left = dp.recv((1000,), np.float64, 0, 9, like=np.empty(0))   # nobody waits for it
        dp.recv((4,), np.float64, me + 1, 1, like=np.empty(0)).wait()
    except Exception as error:
        assert is_loss(error), error
        well = False
        assert not is_loss(ValueError())
        revoke()
        del left
        assert base.ABANDONED
assert survivors.agree(well, idle=me == 3) is False
free()
assert not base.ABANDONED
assert survivors.shrink() == [2] and survivors.ranks == [0, 1, 3]
assert survivors.agree(True)
again = survivors.group([3, 0])if me != 1 else None
if again is not None:
    with Mesh(again, dp=2, shared_memory="no") as mesh:
        assert mesh["dp"].all_reduce(np.ones(2)).wait().tolist() == [2, 2] and mesh.launched[0] == 3
assert not alone(MPI)
print("left", flush=True)
"""


def test_ranks_that_are_left(run_mpi: Callable[..., CompletedProcess[str]]) -> None:
    probe = "from mpi4py import MPI; print(MPI.Get_library_version())"
    if "Open MPI v5" not in run_mpi(1, [sys.executable, "-c", probe]).stdout:
        pytest.skip("no Open MPI 5")
    root = str(Path(base.__file__).parents[2])
    argv = ["--with-ft", "ulfm", sys.executable, "-c", PROGRAM]
    done = run_mpi(4, argv, timeout=100, env={"PYTHONPATH": root})
    assert done.returncode == 0 and done.stdout.count("left") == 3, done.stderr


@pytest.mark.mpi
def test_none_is_lost_without_the_launchers_help(world: Intracomm) -> None:
    from hpcmp.comm import survive
    from hpcmp.comm.detect import alone

    assert "mpirun --with-ft ulfm" in survive.missing()
    assert not survive.is_loss(ValueError())
    from mpi4py import MPI

    assert alone(MPI) is (world.size == 1)


@pytest.mark.mpi(min_size=2)
def test_what_a_mesh_has_freed_is_held_no_more(world: Intracomm) -> None:
    from mpi4py import MPI

    from hpcmp.comm import survive

    before = [comm for comm in survive._held if comm != MPI.COMM_NULL]
    with Mesh(world, dp=world.size, shared_memory="no") as mesh:
        mesh["dp"].all_reduce(np.ones(1)).wait()
        held = [comm for comm in survive._held if comm != MPI.COMM_NULL]
        assert mesh.comm in held and len(held) >= len(before) + 2
    assert [comm for comm in survive._held if comm != MPI.COMM_NULL] == before


class Request:
    def __init__(self, over: bool) -> None:
        self.over = over

    def Test(self) -> bool:
        return self.over


@pytest.mark.mpi
def test_memory_that_is_in_use_stays(world: Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpcmp.comm.survive import free

    monkeypatch.setattr(base, "ABANDONED", [])
    for over in (True, False):
        Pending(np.zeros(1), [Request(over), Request(True)])  # nobody waits for it
    kept = base.ABANDONED[1]
    monkeypatch.setattr("hpcmp.comm.survive._LATE", 0.01)
    free()
    assert base.ABANDONED == [kept]
