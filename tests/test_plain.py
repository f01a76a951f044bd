"""Plain files alone: whatever else has the name is refused at once."""

from __future__ import annotations

import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcmp.plain import PlainFile, read_whole


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    return path


def test_reading(path: Path) -> None:
    with PlainFile(path) as file:
        assert (file.path, file.size) == (path, 100)
        buffer = bytearray(30)
        file.seek(10)
        assert file.readinto(buffer) == 30 and bytes(buffer) == bytes(range(10, 40))
    assert file.closed
    assert read_whole(path, 100) == bytes(range(100))


def test_a_file_that_ends_early(path: Path) -> None:
    with PlainFile(path) as file:
        os.truncate(path, 50)
        with pytest.raises(OSError, match="ends at byte 50"):
            file.readinto(bytearray(51))


def test_a_file_that_is_too_long_is_not_read(path: Path) -> None:
    os.truncate(path, 1 << 40)
    tracemalloc.start()
    with pytest.raises(OSError, match="not a file of at most 1000 bytes"):
        read_whole(path, 1000)
    assert tracemalloc.get_traced_memory()[1] < 1 << 16
    tracemalloc.stop()


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(path.parent)
        made.bind(path.name)


OTHERS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "socket": socket_at,
    "link": lambda path: path.symlink_to("elsewhere"),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_nothing_else_is_opened(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").write_bytes(b"secret")
    OTHERS[kind](tmp_path / "other")
    with pytest.raises(OSError, match="not a plain file") as caught:
        PlainFile(tmp_path / "other")
    assert caught.value.filename == str(tmp_path / "other")


def test_links_where_they_are_allowed(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    with PlainFile(tmp_path / "link", links=True) as file:
        assert file.size == 100
    for target in ("/dev/zero", "nowhere", "loop"):
        name = "loop" if target == "loop" else f"to {target.strip('/').replace('/', ' ')}"
        (tmp_path / name).symlink_to(target)
        with pytest.raises(OSError):
            PlainFile(tmp_path / name, links=True)


def test_what_takes_the_place_of_a_file_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first look and the opening: neither waited for nor followed."""
    real = os.open
    for put in (os.mkfifo, lambda place: os.symlink("/dev/zero", place)):

        def late(name: Path, *args: int, put: Callable[[Path], object] = put) -> int:
            name.unlink()
            put(name)
            return real(name, *args)

        monkeypatch.setattr(os, "open", late)
        with pytest.raises(OSError):
            PlainFile(path)
        monkeypatch.undo()
        path.unlink()
        path.write_bytes(b"again")
