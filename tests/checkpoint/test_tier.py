"""The local tier on nodes that one machine plays: what it keeps, what it takes, and what a failure of it costs."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hpcmp.checkpoint import Lock, open_checkpoint, share
from hpcmp.checkpoint.tier import KEPT, NAME, open_tier
from hpcmp.comm.mesh import Mesh
from hpcmp.errors import InputError
from tests.checkpoint.cases import STATE, assert_filled, owned, targets, version_at
from tests.checkpoint.on_nodes import NODES, alone, nodes, save, stored, tier
from tests.harness.launch import ROOT

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

mpi = pytest.mark.mpi


@mpi
def test_a_step_is_loaded_again(world: Intracomm, mpi_tmp_path: Path) -> None:
    with tier(world, mpi_tmp_path) as made:
        assert save(made, 1, 2, 3)
    with tier(world, mpi_tmp_path) as made:
        found = made.checkpoints()
        assert [(c.step, c.state) for c in found] == [(3, STATE), (2, STATE)]  # two are kept
        for checkpoint in found:
            slabs = targets(made.mesh)
            checkpoint.load(slabs)
            assert_filled(slabs, checkpoint.step)
            break  # the newest that was loaded stays, and no other
        assert [c.step for c in made.checkpoints()] == [3]
        world.Barrier()
        made.clear()
    world.Barrier()
    assert list(mpi_tmp_path.glob("node*/*")) == []


@mpi
def test_what_lies_where(world: Intracomm, mpi_tmp_path: Path) -> None:
    """A node has the manifest, its ranks' files and those of the node before; on a single node it is a checkpoint."""
    with tier(world, mpi_tmp_path) as made:
        save(made, 7)
        nodes = made.mesh.topology.nodes
    count = max(nodes) + 1
    if world.rank == 0:
        for node in range(count):
            near = {node, (node - 1) % count}
            files = [f"rank_{rank:05d}.h5" for rank, there in enumerate(nodes) if there in near]
            assert stored(mpi_tmp_path, node) == {"step_00000007": ["manifest.json", *files]}
        if count <= 2:
            (path,) = (mpi_tmp_path / "node0" / "this").iterdir()
            assert version_at(path) == 7 and open_checkpoint(path).verify() == []


@mpi
def test_another_runs_steps_are_not_seen_and_stay(world: Intracomm, mpi_tmp_path: Path) -> None:
    with tier(world, mpi_tmp_path, "other") as made:
        save(made, 5)
    with tier(world, mpi_tmp_path) as made:
        assert made.checkpoints() == []
        save(made, 1, 2, 3)
        made.clear()
    world.Barrier()
    assert set(stored(mpi_tmp_path, 0, "other")) == {"step_00000005"}


@mpi
def test_the_runs_name_is_kept_beside_its_checkpoints(world: Intracomm, mpi_tmp_path: Path) -> None:
    with Mesh(world, dp=world.size) as mesh:
        first = open_tier(str(mpi_tmp_path), mpi_tmp_path, mesh, fresh=False)
        again = open_tier(str(mpi_tmp_path), mpi_tmp_path, mesh, fresh=False)
        assert again.known and not first.known
        world.Barrier()
        fresh = open_tier(str(mpi_tmp_path), mpi_tmp_path, mesh, fresh=True)
        assert first.root == again.root != fresh.root
        assert len(set(mesh.gather_objects(fresh.root))) == 1
        with pytest.raises(InputError, match=r"checkpoint\.local: .*\$NO_SUCH_DISK/x has a variable that is not set"):
            open_tier("/$NO_SUCH_DISK/x", mpi_tmp_path, mesh, fresh=False)


@mpi
def test_a_disk_that_fails_ends_the_tier_and_nothing_else(
    world: Intracomm, mpi_tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tier(world, mpi_tmp_path) as made:
        save(made, 1)
        alone(world, lambda: shutil.rmtree(mpi_tmp_path / "node0"))
        alone(world, lambda: (mpi_tmp_path / "node0").write_text("no directory"))
        assert not save(made, 2) and not save(made, 3)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == (world.rank == 0)
    assert all("local checkpoint of step 2" in text and "node0" in text and "no more" in text for text in warnings)


@mpi
def test_what_a_run_had_before_it_began_anew_goes_with_its_first_step(world: Intracomm, mpi_tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPCMP_NODES", NODES[world.size])
        with Mesh(world, tp=world.size) as mesh:
            folder = f"{mpi_tmp_path}/node{{node}}"
            first = open_tier(folder, mpi_tmp_path, mesh, fresh=False)
            save(first, 1)
            fresh = open_tier(folder, mpi_tmp_path, mesh, fresh=True)
            assert first.root.exists() and not fresh.known and fresh.checkpoints() == []
            world.Barrier()
            assert save(fresh, 1)
            world.Barrier()
            assert not first.root.exists() and fresh.root.exists()
            world.Barrier()
            fresh.clear()
            world.Barrier()
            assert not fresh.root.exists() and not (mpi_tmp_path / NAME).exists()
            world.Barrier()


@mpi
def test_never_more_than_two_steps_and_what_they_take_is_told(
    world: Intracomm, mpi_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even while one is written; nor after a restart."""
    caplog.set_level("INFO", "hpcmp")
    seen = []
    real = share.write
    with tier(world, mpi_tmp_path) as made:
        monkeypatch.setattr(share, "write", lambda *args: (seen.append(len(list(made.root.iterdir()))), real(*args))[1])
        save(made, 1, 2, 3, 4)
    with tier(world, mpi_tmp_path) as made:
        assert made.checkpoints()[0].step == 4
        save(made, 5, 6)
        assert seen == [1, 2, 2, 2, 2, 2] and KEPT == 2
    told = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    assert len(told) == 2 * (world.rank == 0)
    assert all("checkpoint.local: " in line and " MB at most on a node, in " in line for line in told)


@mpi
def test_a_run_that_lost_its_lock_saves_nothing(
    world: Intracomm, mpi_tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another has its directories, and its name on the nodes."""
    lock = Lock(mpi_tmp_path)
    if world.rank == 0:
        lock.take()
        text = lock.path.read_bytes()
        other = json.loads(text) | {"pid": os.getppid(), "start": None}
        lock.path.write_text(json.dumps(other))
    with tier(world, mpi_tmp_path) as made:
        made.home = mpi_tmp_path
        assert not save(made, 1) and not list(mpi_tmp_path.glob("node*/this/*"))
    assert caplog.text.count("is in use by process") == (world.rank == 0)
    world.Barrier()
    if world.rank == 0:
        lock.path.write_bytes(text)
        lock.release()


@mpi
def test_a_full_disk_ends_the_tier_and_the_step_before_stays(
    world: Intracomm, mpi_tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The limit on the length of a file stands for it, on the last rank alone."""
    with tier(world, mpi_tmp_path) as made:
        save(made, 1)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if world.rank == world.size - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            done = save(made, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not done and not save(made, 3)
        world.Barrier()
        assert all(list(stored(mpi_tmp_path, node)) == ["step_00000001"] for node in nodes(world))
    assert caplog.text.count("local checkpoint of step 2 is not saved") == (world.rank == 0)
    with tier(world, mpi_tmp_path) as made:
        slabs = targets(made.mesh)
        made.checkpoints()[0].load(slabs)
        assert_filled(slabs, 1)


@mpi
def test_slabs_that_do_not_tile_are_refused(world: Intracomm, mpi_tmp_path: Path) -> None:
    with tier(world, mpi_tmp_path) as made:
        assert not made.save(1, 2 * list(owned(made.mesh)), STATE)
    assert [path for path in mpi_tmp_path.rglob("*") if path.is_file()] == []


JOB = """
import os, sys
from mpi4py import MPI
from hpcmp.checkpoint.tier import LocalTier
from hpcmp.comm.mesh import Mesh
from tests.checkpoint.cases import STATE, assert_filled, owned, targets

with Mesh(MPI.COMM_WORLD, tp=MPI.COMM_WORLD.size) as mesh:
    tier = LocalTier(sys.argv[1] + "/node{node}", "this", mesh)
    for checkpoint in tier.checkpoints():
        slabs = targets(mesh)
        checkpoint.load(slabs)
        assert_filled(slabs, checkpoint.step)
        if mesh.rank == 0:
            print(checkpoint.step)
        break
    for step in map(int, sys.argv[3:]):
        if step == 3:
            os.environ["HPCMP_FAILPOINT"] = sys.argv[2]
        tier.save(step, owned(mesh, step), STATE)
"""


@pytest.mark.parametrize("phase", ["write:1", "move:0", "manifest:1"])
def test_killed_while_it_saves(tmp_path: Path, run_mpi: Any, phase: str) -> None:
    """The step before is whole, or this one if a node was through; what was begun is swept by the next save."""

    def job(*args: str) -> Any:
        argv = [sys.executable, "-c", JOB, str(tmp_path), f"local {phase}", *args]
        return run_mpi(2, argv, 120, {"HPCMP_NODES": "0,1"}, ROOT)

    assert job("1", "2", "3").returncode != 0
    assert any("step_00000002" in stored(tmp_path, node) for node in (0, 1))
    done = job("4")
    assert done.returncode == 0 and done.stdout.strip() in ("23" if "manifest" in phase else "2"), done.stderr
    for node in (0, 1):
        kept = stored(tmp_path, node)
        assert "step_00000004" in kept and len(kept) == 2 and not any(name.startswith(".") for name in kept)
