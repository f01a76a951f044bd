"""Files on their way from node to node: to partners, to readers, and what comes of a disk that fails meanwhile."""

from __future__ import annotations

from inspect import currentframe, getframeinfo
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hpcmp.checkpoint import moves
from hpcmp.checkpoint.moves import Move, to_partners, to_readers
from hpcmp.comm import recorder
from hpcmp.comm.mesh import Mesh
from hpcmp.errors import CheckpointError

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

several = pytest.mark.mpi(min_size=2)


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
    assert found == [Move(2, 0, "c", 5), Move(0, 2, "a", 5), Move(1, 3, "b", 5)]  # c had no second copy
    assert to_readers([0, 0], sizes, [{"a"}, {"c"}], {0: ["a", "b", "c"]}) == []
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


@several
def test_every_message_is_recorded_where_the_moves_are_made(
    world: Intracomm, mpi_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a rank that misses one is a hang with a name."""
    monkeypatch.setattr(recorder, "RECORDER", fresh := recorder.Recorder())
    monkeypatch.setattr(moves, "BLOCK", 1000)
    folder, after, before = mpi_tmp_path / f"rank{world.rank}", world.rank + 1, world.rank - 1
    folder.mkdir()
    (folder / f"of{world.rank}").write_bytes(bytes(1500))
    with Mesh(world, dp=world.size) as mesh:
        line = getframeinfo(currentframe()).lineno + 1
        moves.make([Move(a, a + 1, f"of{a}", 1500) for a in range(world.size - 1)], folder, mesh)
        told = [r for r in fresh.snapshot()["records"] if r["tag"] is not None]
    ends = [("send", after)] * (after < world.size) + [("recv", before)] * (before >= 0)
    assert [(r["operation"], r["peer"], r["count"]) for r in told] == [(*end, n) for n in (1000, 500) for end in ends]
    assert {(r["site"], r["state"], r["dtype"]) for r in told} == {(f"{Path(__file__)}:{line}", "finished", "uint8")}


@several
@pytest.mark.parametrize("fails", ["source", "target"])
def test_nothing_gets_its_name_unless_all_is_there(world: Intracomm, mpi_tmp_path: Path, fails: str) -> None:
    """A disk that fails at one end keeps nobody waiting, and its error is raised there."""
    size, rank = world.size, world.rank
    folder = mpi_tmp_path / f"rank{rank}"
    folder.mkdir()
    (folder / f"of{rank}").write_bytes(bytes(5000))
    last = rank == size - 1
    broken = folder / (f"of{rank}" if fails == "source" else f".of{(rank - 1) % size}.partial")
    if last:
        broken.unlink(missing_ok=True)
        broken.mkdir()
    with Mesh(world, dp=size) as mesh:
        ring = [Move(a, (a + 1) % size, f"of{a}", 5000) for a in range(size)]
        if last:
            with pytest.raises(OSError, match=broken.name):
                moves.make(ring, folder, mesh)
        else:
            moves.make(ring, folder, mesh)
    left = {f"of{rank}"} | ({broken.name} if last else set())
    assert {path.name for path in folder.iterdir()} == left


def test_a_file_appears_at_once(tmp_path: Path) -> None:
    moves.place(tmp_path / "name", b"one")
    (tmp_path / ".name.partial").symlink_to(tmp_path / "elsewhere")
    moves.place(tmp_path / "name", b"two")
    assert [path.name for path in tmp_path.iterdir()] == ["name"] and (tmp_path / "name").read_bytes() == b"two"
