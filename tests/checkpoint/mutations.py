"""Damage to bytes, JSON and directories, drawn at random: what the fuzz targets do to good inputs."""

from __future__ import annotations

import copy
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

NUMBERS = (-1, 0, 1, 255, 2**15, 2**31 - 1, 2**32, 2**53, 2**56, 2**62 - 1, 2**62, 2**63, 2**64, 10**40)
WORDS = ("", ".", "..", "../x", "/etc/passwd", "a/../../b", "a\0b", "\x1b[2J", "a\nb", "ü", "x" * 5000, "step_00000001")
VALUES = (*NUMBERS, *WORDS, 1.5, -0.0, 1e308, float("nan"), float("inf"), None, True, [], {}, [[]], [0] * 33, {"a": 1})


def bytes_changed(draw: Random, data: bytes, allowed: list[range]) -> bytes:
    """``data`` with one to four changes at places out of ``allowed``: flipped bits, numbers, copied pieces."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        area = draw.choices(allowed, [len(r) for r in allowed])[0]
        at = draw.choice(area)
        match draw.randrange(6):
            case 0 | 1:
                changed[at] ^= 1 << draw.randrange(8)
            case 2:
                changed[at] = draw.choice((0, 1, 2, 3, 4, 8, 127, 128, 254, 255, draw.randrange(256)))
            case 3 | 4:
                size = draw.choice((2, 4, 8))
                number = draw.choice((*NUMBERS, draw.randrange(2 * len(data)), draw.getrandbits(8 * size)))
                new = (number % 256**size).to_bytes(size, "little")[: max(0, area.stop - at)]
                changed[at : at + len(new)] = new
            case _:
                size = draw.randrange(1, 64)
                source = draw.randrange(max(1, len(data) - size))
                new = data[source : source + size][: max(0, area.stop - at)]
                changed[at : at + len(new)] = new
    return bytes(changed)


def length_changed(draw: Random, data: bytes) -> bytes:
    """``data`` cut, lengthened, or with a piece more or less within."""
    at = draw.choice((0, 1, len(data) // 2, len(data) - 1, draw.randrange(len(data) + 1)))
    size = draw.choice((1, 2, 8, 100, 4096))
    return draw.choice(
        (data[:at], data + bytes(size), data[:at] + data[at + size :], data[:at] + bytes(size) + data[at:])
    )


def json_changed(draw: Random, content: Any, words: tuple[str, ...] = ()) -> list[str]:
    """Change the JSON value ``content`` in place at one to three of its nodes; says where. words: more of WORDS."""
    told = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        nodes = list(_nodes(content))
        parent, key = draw.choice(nodes)
        told.append(f"{key}")
        match draw.randrange(8):
            case 0 | 1 | 2:
                parent[key] = draw.choice((*VALUES, *words))
            case 3:
                del parent[key]
            case 4:
                other, place = draw.choice(nodes)
                if _is_there(other, place):
                    parent[key] = copy.deepcopy(other[place])
            case 5 if isinstance(parent[key], int):
                parent[key] = draw.choice((parent[key] + 1, parent[key] - 1, 2 * parent[key], -parent[key]))
            case 6 if isinstance(parent, dict):
                parent[draw.choice((*WORDS, *words))] = parent.pop(key)
            case 7:
                for _ in range(draw.choice((40, 500, 1200))):
                    parent[key] = draw.choice(([parent[key]], {"a": parent[key]}))
            case _ if isinstance(parent, list):
                parent.insert(0, parent[key])
    return told


def _nodes(value: Any, depth: int = 0) -> Any:
    """(container, key) of every node below ``value``, but not below what has been nested deeply."""
    if depth < 12 and isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _nodes(value[key], depth + 1)


def _is_there(container: Any, key: Any) -> bool:
    return key in container if isinstance(container, dict) else key < len(container)


def text_changed(draw: Random, text: bytes) -> bytes:
    """JSON text that is not canonical any more, or none at all."""
    at = draw.choice([i for i, c in enumerate(text) if c in b"{,["] or [0]) + 1
    new = draw.choice(
        (
            b'"step": 1, "step": 2,',
            b"1e999,",
            b"NaN,",
            b"9" * 5000 + b",",
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b"\xff\xfe",
        )
        + (b'"\\ud800",', b"\xef\xbb\xbf", b" ", b"/* */", b"0x10,", b"'a',", b"\0", b'"\\u0000": 1,')
    )
    return text[:at] + new + text[at:]


def _fifo(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path, outside: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _device(path: Path, outside: Path) -> None:
    try:
        os.mknod(path, 0o020666, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        path.symlink_to("/dev/zero")


def _twin(path: Path, outside: Path) -> None:
    """A link to what is there outside: whoever follows it finds all in order."""
    path.symlink_to(outside / path.name)


INSTEAD: dict[str, Callable[[Path, Path], object]] = {
    "nothing": lambda path, outside: None,
    "a pipe": _fifo,
    "a socket": _socket,
    "a device": _device,
    "a link outside": _twin,
    "a relative link outside": lambda path, outside: path.symlink_to(os.path.relpath(outside / path.name, path.parent)),
    "a link to itself": lambda path, outside: path.symlink_to(path.name),
    "a dangling link": lambda path, outside: path.symlink_to("nowhere"),
    "a folder": lambda path, outside: path.mkdir(),
    "an empty file": lambda path, outside: path.touch(),
    "a sparse file": lambda path, outside: (path.touch(), os.truncate(path, 1 << 28)),
}


def instead(draw: Random, path: Path, outside: Path, kinds: Sequence[str] = ()) -> str:
    """Put something else, of ``kinds``, in the place of a file or folder; says what. ``outside`` has others by the same
    names."""
    kind = draw.choice(kinds or list(INSTEAD))
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    INSTEAD[kind](path, outside)
    return f"{path.name}: {kind}"
