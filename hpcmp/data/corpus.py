"""The documents of a corpus: text files, found in folders, always in the same order.

Each file is one document. Folders are walked in the order of their names, so the same tree gives the same token file
on every machine. Files that are no text are left out, with the reason; nothing is left out in silence.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

from ..errors import InputError

PIECE = 1 << 17  # bytes; longer documents come in pieces of about this size, which end at a line's end


class Skip(Exception):
    """This document is left out; the argument is one of ``SKIPPED``."""


#: Why a file may be left out: not UTF-8 text, without text, no regular file (a pipe, a socket, a dangling link).
SKIPPED = ("binary", "empty", "special")


@dataclass(frozen=True)
class Document:
    """A file: ``name`` is its path inside the folder that was given, with "/"; ``modified`` is in nanoseconds."""

    name: str
    path: Path
    size: int
    modified: int
    regular: bool


@dataclass(frozen=True)
class Corpus:
    """Files, and folders walked recursively; iterating gives every ``Document`` in order.

    ``include`` and ``exclude`` are glob patterns for what is found in folders (a file that is named itself is always
    taken): a pattern without "/" is matched with the last part of a name, one with "/" with the whole name; an excluded
    folder is not entered. Links are followed, and no folder is entered twice, whatever links to it.

    ``skip`` are paths never taken: the output, should it lie within an input.
    """

    inputs: Sequence[str | Path]
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    skip: Sequence[Path] = ()

    def __post_init__(self) -> None:
        if not self.inputs:
            raise InputError("no input: give files or folders of text")
        resolved: dict[Path, str | Path] = {}
        for path in self.inputs:
            if not Path(path).exists():
                raise InputError(f"no such input: {path}")
            real = Path(path).resolve()
            if real in resolved:
                raise InputError(f"input given twice: {path}")
            resolved[real] = path
        for real, path in resolved.items():
            for parent in real.parents:
                if parent in resolved:
                    raise InputError(f"input given twice: {path} lies in {resolved[parent]}")

    def __iter__(self) -> Iterator[Document]:
        seen: set[tuple[int, int]] = set()
        skipped = {path.name: path.parent.resolve() for path in self.skip}
        stack = [(Path(path), "") for path in reversed(self.inputs)]
        while stack:
            path, name = stack.pop()
            try:
                status = path.stat()
            except PermissionError as error:
                raise unreadable(path, error) from None
            except OSError:  # a link to nothing, or to itself
                yield Document(name, path, 0, 0, regular=False)
                continue
            if stat.S_ISDIR(status.st_mode):
                if (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    inside = [f"{name}/{entry}" if name else entry for entry in sorted(_listing(path), reverse=True)]
                    stack += [(path / n.rpartition("/")[2], n) for n in inside if not _matches(n, self.exclude)]
            elif path.name in skipped and path.parent.resolve() == skipped[path.name]:
                continue
            elif not name or not self.include or _matches(name, self.include):
                regular = stat.S_ISREG(status.st_mode)
                yield Document(name or path.name, path, status.st_size, status.st_mtime_ns, regular)


def read(document: Document) -> Iterator[bytes]:
    """The text of a document in pieces of about ``PIECE`` bytes, each UTF-8 in itself.

    Raises Skip before the first piece if the file is not text (a NUL or a byte sequence that is not UTF-8, anywhere in
    it), empty, or not a regular file; InputError if it cannot be read.
    """
    if not document.regular:
        raise Skip("special")
    try:
        with open(document.path, "rb") as file:
            parts = _pieces(file)
            first = next(parts, b"")
            if not first:
                raise Skip("empty")
            if not _is_text(first):
                raise Skip("binary")
            if not file.peek(1):
                yield first
                return
            if not all(map(_is_text, parts)):  # long documents are read twice, never held whole
                raise Skip("binary")
            file.seek(0)
            yield from _pieces(file)
    except OSError as error:
        raise unreadable(document.path, error) from None


def unreadable(path: Path, error: OSError) -> InputError:
    """The error for an input that cannot be read."""
    return InputError(f"cannot read {path}: {error.strerror or error} (leave it out with --exclude)")


def _listing(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise unreadable(folder, error) from None


def _matches(name: str, patterns: Sequence[str]) -> bool:
    last = name.rpartition("/")[2]
    return any(fnmatchcase(name if "/" in p else last, p) for p in (q.rstrip("/") for q in patterns))


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(PIECE):
        piece += file.readline(PIECE)
        for _ in range(3):  # a line longer than PIECE: end at least between two characters
            following = file.peek(1)[:1]  # type: ignore[attr-defined]
            if following and following[0] & 0xC0 == 0x80:
                piece += file.read(1)
        yield piece


def _is_text(piece: bytes) -> bool:
    if b"\0" in piece:
        return False
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
