"""Schedules in files: what is written reads back, what is wrong is named with its line, and any can be drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcmp.errors import InputError
from hpcmp.parallel.schedules import SCHEDULES, Action, make_schedule, plot, read_schedule, simulate, write_schedule


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_written_reads_back(name: str, tmp_path: Path) -> None:
    schedule = make_schedule(name, 3 if name == "interleaved" else 1)
    write_schedule(schedule, 3, 7, tmp_path / "plan.txt")
    read = make_schedule(f"file:{tmp_path / 'plan.txt'}", schedule.chunks)
    assert (read.chunks, read.placement) == (schedule.chunks, schedule.placement)
    assert [list(read(r, 3, 7)) for r in range(3)] == [list(schedule(r, 3, 7)) for r in range(3)]
    for m in range(8):  # a file for many microbatches serves for few
        simulate(read, 3, m)
    assert list(read.forward_only()(0, 3, 9)) == list(schedule.forward_only()(0, 3, 9))


def test_by_hand(tmp_path: Path) -> None:
    (tmp_path / "plan").write_text("# mine\n\n0: F0 F1 B1 B0  # from the last to the first\n1: F0 F1 B1 B0\n")
    read = read_schedule(tmp_path / "plan")
    assert (read.chunks, read.placement) == (1, "loop")
    assert list(read(1, 2, 2)) == [Action("F", 0), Action("F", 1), Action("B", 1), Action("B", 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": no line of a rank"),
        ("chunks 2\nplacement w\n", "line 2: placement: expected loop or v, found 'w'"),
        ("chunks 0\n", "line 1: chunks: expected a number of at least 1, found '0'"),
        ("chunks\n", "line 1: chunks: expected a number of at least 1, found ''"),
        ("0: F0 B0\nchunks 2\n", "line 2: chunks must stand before the ranks"),
        ("0: F0 B0\n2: F0 B0\n", "line 2: expected chunks, placement or 1:, found '2:'"),
        ("0: F0 G0 B0\n", "line 1: expected an action such as F0, B12 or W3.1, found 'G0'"),
        ("0: F0 B-1\n", "line 1: expected an action .* found 'B-1'"),
        ("0: F0.1 B0\n", "line 1: F0.1: there is no chunk 1, chunks is 1"),
        ("0: F0 B0\n# rank 1\n1: F0\n", "line 3: rank 1 misses or repeats B0"),
        ("0: F0 B0\n1: F0 B0 B0\n", "line 2: rank 1 misses or repeats B0"),
        ("0: F0 B0 W0\n1: F0 B0\n", "line 2: rank 1 misses or repeats W0"),
        ("0: B0 F0\n", "line 1: rank 0 takes microbatch 0 out of order"),
        ("0: F1 B1 F0 B0\n1: F0 B0 F1 B1\n", ": deadlock, the ranks wait at {0: 'B1', 1: 'F0'}"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "plan").write_text(text)
    with pytest.raises(InputError, match=f"^schedule [^ ]*plan.*{message}"):
        make_schedule(f"file:{tmp_path / 'plan'}")


def test_other_sizes_than_the_file_has(tmp_path: Path) -> None:
    write_schedule(make_schedule("1f1b"), 2, 4, tmp_path / "plan")
    read = read_schedule(tmp_path / "plan")
    with pytest.raises(InputError, match="plan is for 2 pipeline ranks, and there are 3"):
        read(0, 3, 4)
    with pytest.raises(InputError, match="plan is for up to 4 microbatches, and there are 5"):
        read(0, 2, 5)
    with pytest.raises(InputError, match="has 1 virtual stage.* a rank, not 2"):
        make_schedule(f"file:{tmp_path / 'plan'}", 2)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path, message in [("gone", "No such file"), ("binary", "decode")]:
        with pytest.raises(InputError, match=f"{path}: cannot be read: .*{message}"):
            read_schedule(tmp_path / path)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plot(kind: str, tmp_path: Path) -> None:
    """A box an action, which a picture in SVG shows as a path of its colour."""
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plan.{kind}"
    plot([make_schedule("1f1b"), make_schedule("zb-v")], 2, 3, (1, 1, 1), path)
    if kind == "png":
        assert path.read_bytes().startswith(b"\x89PNG")
    else:
        text = path.read_text()
        boxes = {colour: text.count(f"fill: {colour}") for colour in ("#4078d9", "#33a673", "#f2a633")}
        assert boxes == {"#4078d9": 2 * 3 + 2 * 3 + 1, "#33a673": 2 * 3 + 2 * 3 + 1, "#f2a633": 2 * 3 + 1}
