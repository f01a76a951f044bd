"""The documents of a corpus: all of them, in order, each once, and only text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from hpcmp.data import corpus as module
from hpcmp.data.corpus import Corpus, Skip, read
from hpcmp.errors import InputError


def tree(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def names(*inputs: Path, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    return [document.name for document in Corpus(inputs, include, exclude)]


def text_of(path: Path) -> bytes:
    (document,) = Corpus([path])
    return b"".join(read(document))


def test_sorted_and_recursive(tmp_path: Path) -> None:
    tree(tmp_path, "b/z.txt", "b/a.txt", "c.txt", "a/deep/er/x", "B.txt", ".hidden")
    assert names(tmp_path) == [".hidden", "B.txt", "a/deep/er/x", "b/a.txt", "b/z.txt", "c.txt"]


def test_inputs_in_the_order_given(tmp_path: Path) -> None:
    tree(tmp_path, "one/x", "two/y", "three.txt")
    assert names(tmp_path / "two", tmp_path / "three.txt", tmp_path / "one") == ["y", "three.txt", "x"]


def test_patterns(tmp_path: Path) -> None:
    tree(tmp_path, "a.py", "a.txt", "test/b.py", "lib/test/c.py", "lib/d.py", "lib/tests.py", "lib/e.pyc")
    assert names(tmp_path, include=["*.py"]) == ["a.py", "lib/d.py", "lib/test/c.py", "lib/tests.py", "test/b.py"]
    assert names(tmp_path, include=["*.py"], exclude=["test"]) == ["a.py", "lib/d.py", "lib/tests.py"]
    assert names(tmp_path, include=["*.py"], exclude=["test/"]) == ["a.py", "lib/d.py", "lib/tests.py"]
    assert names(tmp_path, include=["*.py"], exclude=["lib/test", "a.*"]) == ["lib/d.py", "lib/tests.py", "test/b.py"]
    assert names(tmp_path, include=["lib/*.py"]) == ["lib/d.py", "lib/test/c.py", "lib/tests.py"]
    assert names(tmp_path, include=["*.txt", "*.pyc"]) == ["a.txt", "lib/e.pyc"]
    assert names(tmp_path / "a.txt", include=["*.py"]) == ["a.txt"]  # a file that is named itself


@pytest.mark.timeout(10)
def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    tree(tmp_path, "in/a/x.txt", "in/b/y.txt", "out/z.txt")
    (tmp_path / "in/a/up").symlink_to(tmp_path / "in")  # a loop
    (tmp_path / "in/a/self").symlink_to("self")  # a link to itself
    (tmp_path / "in/b/again").symlink_to(tmp_path / "in/a")  # a second way to the same folder
    (tmp_path / "in/c").symlink_to(tmp_path / "out")
    (tmp_path / "in/dead").symlink_to(tmp_path / "gone")
    documents = list(Corpus([tmp_path / "in"]))
    assert [d.name for d in documents if d.regular] == ["a/x.txt", "b/y.txt", "c/z.txt"]
    assert [d.name for d in documents if not d.regular] == ["a/self", "dead"]


def test_deep_folders(tmp_path: Path) -> None:
    deep = tmp_path
    for _ in range(300):
        deep /= "d"
    tree(deep, "x")
    assert names(tmp_path) == ["d/" * 300 + "x"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"a\0b", "binary"), (b"caf\xe9", "binary"), ("x".encode("utf-16"), "binary")],
)
def test_no_text(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(Skip, match=reason):
        text_of(path)


@pytest.mark.timeout(10)
def test_pipes_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Skip, match="special"):
        text_of(tmp_path / "pipe")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 100])
@pytest.mark.parametrize("text", ["one\ntwo\n\nthree", "no line end, 文字🙂 " * 9, "🙂" * 20 + "\n", "x"])
def test_long_documents_come_in_pieces_of_whole_characters(
    size: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", size)
    (tmp_path / "file").write_text(text, "utf-8")
    (document,) = Corpus([tmp_path / "file"])
    pieces = list(read(document))
    assert "".join(piece.decode() for piece in pieces) == text  # each decodes by itself
    assert all(pieces) and max(map(len, pieces)) <= 2 * size + 3


@pytest.mark.parametrize("end", [b"\0", b"\xff", b"\xe6\x96"])
def test_damage_at_the_end_of_a_long_document_is_found_before_its_first_piece(
    end: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", 8)
    (tmp_path / "file").write_bytes(b"good text\n" * 20 + end)
    (document,) = Corpus([tmp_path / "file"])
    with pytest.raises(Skip, match="binary"):
        next(read(document))


def test_the_output_is_no_input(tmp_path: Path) -> None:
    tree(tmp_path, "a.txt", "out.h5", "sub/out.h5")
    corpus = Corpus([tmp_path], skip=[tmp_path / "sub" / ".." / "out.h5"])
    assert [d.name for d in corpus] == ["a.txt", "sub/out.h5"]


def test_bad_inputs(tmp_path: Path) -> None:
    tree(tmp_path, "a/x.txt")
    with pytest.raises(InputError, match="no input"):
        Corpus([])
    with pytest.raises(InputError, match="no such input: .*gone"):
        Corpus([tmp_path / "gone"])
    with pytest.raises(InputError, match="given twice: .*lies in"):
        Corpus([tmp_path, tmp_path / "a" / "x.txt"])
    with pytest.raises(InputError, match="given twice"):
        Corpus([tmp_path / "a", tmp_path / "a" / ".." / "a"])


def test_what_cannot_be_read_stops_the_run(tmp_path: Path) -> None:
    tree(tmp_path, "a/x.txt")
    (tmp_path / "a/x.txt").chmod(0)
    if os.access(tmp_path / "a/x.txt", os.R_OK):
        pytest.skip("this user reads everything, like root")
    with pytest.raises(InputError, match="cannot read .*x.txt.*--exclude"):
        text_of(tmp_path / "a/x.txt")
    (tmp_path / "a").chmod(0)
    try:
        with pytest.raises(InputError, match="cannot read .*a.*--exclude"):
            names(tmp_path)
    finally:
        (tmp_path / "a").chmod(0o700)


def test_what_fails_while_it_is_read_stops_the_run(tmp_path: Path) -> None:
    tree(tmp_path, "x.txt")
    (document,) = Corpus([tmp_path])
    (tmp_path / "x.txt").unlink()
    with pytest.raises(InputError, match="cannot read .*x.txt: No such file"):
        list(read(document))
