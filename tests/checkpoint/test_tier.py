"""The local tier on nodes that one machine plays: whatever is lost, moved or damaged, a step is whole or not taken."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.checkpoint import moves, open_checkpoint
from hpcmp.checkpoint.moves import Move, to_partners, to_readers
from hpcmp.checkpoint.tier import LocalTier, open_tier
from hpcmp.comm.mesh import Mesh
from hpcmp.errors import CheckpointError, InputError
from tests.checkpoint.cases import STATE, assert_filled, assert_untouched, owned, targets, version_at
from tests.harness.launch import ROOT

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

#: The node of each rank, for each number of ranks.
NODES = {1: "0", 2: "0,1", 3: "0,0,1", 4: "0,0,1,1", 8: "0,0,1,1,2,2,3,3"}

mpi = pytest.mark.mpi
several = pytest.mark.mpi(min_size=2)


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


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def copies(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"node*/this/step_*/{name}"))


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
        assert made.checkpoints(after=found[0].saved) == []
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


@several
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_node_gets_its_part_from_its_partner(world: Intracomm, mpi_tmp_path: Path, lost: int) -> None:
    with tier(world, mpi_tmp_path) as made:
        save(made, 1, 2)
    last = f"rank_{world.size - 1:05d}.h5"  # has the scalar, which every rank needs
    alone(world, lambda: shutil.rmtree(mpi_tmp_path / f"node{lost}"))
    with tier(world, mpi_tmp_path) as made:
        checkpoint = made.checkpoints()[0]
        slabs = targets(made.mesh)
        checkpoint.load(slabs)
        assert_filled(slabs, 2)
        world.Barrier()
        own = {f"rank_{rank:05d}.h5" for rank, node in enumerate(made.mesh.topology.nodes) if node == lost}
        assert stored(mpi_tmp_path, lost) == {"step_00000002": ["manifest.json", *sorted(own | {last})]}
        assert save(made, 3)
        assert [c.step for c in made.checkpoints()] == [3, 2]


@several
def test_two_neighbours_lost_are_too_many(world: Intracomm, mpi_tmp_path: Path) -> None:
    with tier(world, mpi_tmp_path) as made:
        save(made, 1)

    def lose() -> None:
        for node in (0, 1):
            shutil.rmtree(mpi_tmp_path / f"node{node}")

    alone(world, lose)
    with tier(world, mpi_tmp_path) as made:
        assert made.checkpoints() == []


@several
def test_nodes_may_change_places(world: Intracomm, mpi_tmp_path: Path) -> None:
    """After a restart another node is the first: what it has is another ranks'."""
    with tier(world, mpi_tmp_path) as made:
        save(made, 1)

    def swap() -> None:
        (mpi_tmp_path / "node0").rename(mpi_tmp_path / "other")
        (mpi_tmp_path / "node1").rename(mpi_tmp_path / "node0")
        (mpi_tmp_path / "other").rename(mpi_tmp_path / "node1")

    alone(world, swap)
    with tier(world, mpi_tmp_path) as made:
        slabs = targets(made.mesh)
        made.checkpoints()[0].load(slabs)
        assert_filled(slabs, 1)


@several
def test_another_layout_loads_it_too(world: Intracomm, mpi_tmp_path: Path) -> None:
    with tier(world, mpi_tmp_path, tp=world.size) as made:
        save(made, 1)
    for axes in ({"dp": world.size}, {"pp": world.size}):
        with tier(world, mpi_tmp_path, **axes) as made:
            slabs = targets(made.mesh)
            made.checkpoints()[0].load(slabs)
            assert_filled(slabs, 1)


@several
def test_a_flipped_bit_is_mended_by_the_copy(
    world: Intracomm, mpi_tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tier(world, mpi_tmp_path) as made:
        save(made, 1, 2)
    victim = next(path for path in copies(mpi_tmp_path, "rank_00000.h5") if "step_00000002" in str(path))
    alone(world, lambda: flip(victim))
    with tier(world, mpi_tmp_path) as made:
        slabs = targets(made.mesh)
        made.checkpoints()[0].load(slabs)
        assert_filled(slabs, 2)
    assert (caplog.text.count("looking for its copy") == 1) is (world.rank == 0)


@several
def test_no_copy_is_sound(world: Intracomm, mpi_tmp_path: Path) -> None:
    """Nothing changes; the step is not whole from then on, and the one before is taken."""
    with tier(world, mpi_tmp_path) as made:
        save(made, 1, 2)
    victims = [path for path in copies(mpi_tmp_path, "rank_00000.h5") if "step_00000002" in str(path)]
    assert len(victims) == 2
    alone(world, lambda: [flip(path) for path in victims])
    with tier(world, mpi_tmp_path) as made:
        newest, older = made.checkpoints()
        slabs = targets(made.mesh)
        with pytest.raises(CheckpointError, match="local checkpoint of step 2: .*rank_00000.h5 is on no node any more"):
            newest.load(slabs)
        assert_untouched(slabs)
        older.load(slabs)
        assert_filled(slabs, 1)


@mpi
@pytest.mark.parametrize("cut", ["manifest.json", "rank_00000.h5"])
def test_a_shortened_file_is_none(world: Intracomm, mpi_tmp_path: Path, cut: str) -> None:
    with tier(world, mpi_tmp_path) as made:
        save(made, 1)

    def shorten() -> None:
        for path in copies(mpi_tmp_path, cut):
            path.write_bytes(path.read_bytes()[:-1])

    alone(world, shorten)
    with tier(world, mpi_tmp_path) as made:
        assert made.checkpoints() == []


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
def test_slabs_that_do_not_tile_are_refused(world: Intracomm, mpi_tmp_path: Path) -> None:
    with tier(world, mpi_tmp_path) as made:
        assert not made.save(1, 2 * list(owned(made.mesh)), STATE)
    assert [path for path in mpi_tmp_path.rglob("*") if path.is_file()] == []


JOB = """
import sys
from pathlib import Path
from mpi4py import MPI
from hpcmp.checkpoint.tier import LocalTier
from hpcmp.comm.mesh import Mesh
from tests.checkpoint.cases import STATE, owned

with Mesh(MPI.COMM_WORLD, tp=MPI.COMM_WORLD.size) as mesh:
    tier = LocalTier(sys.argv[1] + "/node{node}", "this", mesh)
    for step in map(int, sys.argv[2:]):
        tier.save(step, owned(mesh, step), STATE)
"""

LOAD = """
import sys
from mpi4py import MPI
from hpcmp.checkpoint.tier import LocalTier
from hpcmp.comm.mesh import Mesh
from tests.checkpoint.cases import assert_filled, targets

with Mesh(MPI.COMM_WORLD, tp=MPI.COMM_WORLD.size) as mesh:
    checkpoint = LocalTier(sys.argv[1] + "/node{node}", "this", mesh).checkpoints()[0]
    slabs = targets(mesh)
    checkpoint.load(slabs)
    assert_filled(slabs, checkpoint.step)
    if mesh.rank == 0:
        print(checkpoint.step)
"""


@pytest.mark.parametrize("phase", ["write:1", "move:0", "manifest:0", "manifest:1"])
def test_killed_while_it_saves(tmp_path: Path, run_mpi: Any, phase: str) -> None:
    """The step before is whole, or this one if a node was through; what was begun is swept by the next save."""

    def job(program: str, *args: str, **env: str) -> Any:
        return run_mpi(2, [sys.executable, "-c", program, str(tmp_path), *args], 60, {"HPCMP_NODES": "0,1"} | env, ROOT)

    assert job(JOB, "1", "2").returncode == 0
    assert job(JOB, "3", HPCMP_FAILPOINT=f"local {phase}").returncode != 0
    done = job(LOAD)
    assert done.returncode == 0 and done.stdout.strip() in ("23" if "manifest" in phase else "2"), done.stderr
    assert job(JOB, "4").returncode == 0
    for node in (0, 1):
        assert [name for name in stored(tmp_path, node) if name.startswith(".")] == []
        assert "step_00000004" in stored(tmp_path, node)


def test_partners() -> None:
    """The next node's ranks in turn, around the corner at the end."""
    owners = {f"r{rank}": (rank, 10 + rank) for rank in range(5)}
    assert to_partners([0, 0, 0, 1, 1], owners) == [
        Move(0, 3, "r0", 10),
        Move(1, 4, "r1", 11),
        Move(2, 3, "r2", 12),
        Move(3, 0, "r3", 13),
        Move(4, 1, "r4", 14),
    ]
    assert to_partners([0, 0], {"r0": (0, 1)}) == []


def test_readers() -> None:
    """Each file once to a node that lacks it, the senders sharing the work."""
    sizes = {"a": 5, "b": 5, "c": 5}
    wanted = [{"a"}, {"a", "b"}, {"b", "c"}, {"a", "c"}]
    found = to_readers([0, 0, 1, 1], sizes, wanted, {0: ["a", "b"], 1: ["c"]})
    assert found == [Move(0, 2, "a", 5), Move(1, 3, "b", 5)]
    with pytest.raises(CheckpointError, match="c is on no node any more"):
        to_readers([0, 0, 1, 1], sizes, wanted, {0: ["a", "b"]})


@several
@pytest.mark.parametrize("block", [1000, 1 << 20])
def test_moves(world: Intracomm, mpi_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Files of all lengths, from all ranks to all others at once."""
    monkeypatch.setattr(moves, "BLOCK", block)
    size, rank = world.size, world.rank
    folder = mpi_tmp_path / f"rank{rank}"
    folder.mkdir()
    pairs = [(a, b) for a in range(size) for b in range(size) if a != b]
    lengths = {(a, b): (0, 1, 999, 1000, 1001, 54321)[(a + 3 * b) % 6] for a, b in pairs}
    content = {pair: np.random.default_rng(pair).bytes(n) for pair, n in lengths.items()}
    for a, b in pairs:
        if a == rank:
            (folder / f"from{a}to{b}").write_bytes(content[a, b])
    with Mesh(world, dp=size) as mesh:
        moves.make([Move(a, b, f"from{a}to{b}", lengths[a, b]) for a, b in pairs], folder, mesh)
        expected = {f"from{a}to{b}": text for (a, b), text in content.items() if rank in (a, b)}
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
        gone = size - 1 == rank
        if gone:
            (folder / f"from{rank}to0").unlink()
            with pytest.raises(OSError, match=f"from{rank}to0"):
                moves.make([Move(rank, 0, f"from{rank}to0", 5000)], folder, mesh)
        else:
            moves.make([Move(size - 1, 0, f"from{size - 1}to0", 5000)], folder, mesh)
