"""``hpcmp data prepare`` and ``hpcmp data verify``, as the command line runs them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hpcmp.cli import common, data
from hpcmp.data import TokenFile
from hpcmp.errors import CheckFailed, DataError, InputError


def run(*words: object) -> tuple[dict[str, Any], str]:
    """The result of a command line and its text."""
    parser = common.Parser(prog="hpcmp")
    data.register(parser.add_subparsers())
    args = parser.parse_args([str(word) for word in words])
    result = args.run(args)
    return json.loads(common.to_json(result)), args.show(result)


def test_prepare(corpus: Path, tmp_path: Path) -> None:
    (corpus / "picture.txt").write_bytes(b"\0")
    words = ["data", "prepare", corpus, "--output", tmp_path / "c.h5", "--include", "*.txt", "--held-out", "0.2"]
    result, text = run(*words, "--exclude", "b")
    assert (result["status"], result["files"], result["skipped"]["binary"]) == ("written", 26, 1)
    with TokenFile(tmp_path / "c.h5") as file:
        for name in ("train", "valid"):
            split = file.split(name)
            expected = {"documents": split.documents, "tokens": len(split), "bytes": split.bytes}
            assert result["splits"][name] == expected
            assert f"{len(split):,} tokens" in text
    assert "written in" in text and "26 files" in text and "left out: 1 binary" in text and "note: the valid" in text
    result, text = run(*words, "--exclude", "b")
    assert result["status"] == "unchanged" and "already made from these files" in text
    with pytest.raises(InputError, match="--overwrite"):
        run(*words, "--seed", "1")
    result, _ = run(*words, "--seed", "1", "--overwrite")
    assert (result["status"], result["files"]) == ("written", 40)


def test_prepare_from_several_inputs(corpus: Path, tmp_path: Path) -> None:
    result, _ = run("data", "prepare", corpus / "a", corpus / "b" / "00.txt", "--output", tmp_path / "c.h5")
    assert result["files"] == 27


def test_verify(token_path: Path) -> None:
    result, text = run("data", "verify", token_path)
    assert result["status"] == "whole" and sum(result["tokens"].values()) > 1000
    assert f"{token_path}: whole" in text
    with TokenFile(token_path) as file:
        at = token_path.read_bytes().index(file.split("train").read(0, 100).tobytes())
    with open(token_path, "r+b") as raw:
        raw.seek(at + 50)
        raw.write(b"x")
    with pytest.raises(CheckFailed, match="corpus.h5: train/tokens is damaged"):
        run("data", "verify", token_path)
    os.truncate(token_path, 1000)
    with pytest.raises(DataError, match="truncated or damaged"):
        run("data", "verify", token_path)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["prepare", "--output", "c.h5"], "INPUT"),
        (["prepare", "x"], "--output"),
        (["prepare", "x", "--output", "c.h5", "--held-out", "much"], "--held-out"),
        (["prepare", "gone", "--output", "c.h5"], "no such input: gone"),
        (["prepare", "gone", "--output", "c.h5", "--tokenizer", "wrods"], "no tokenizer 'wrods'"),
        ([], "ACTION"),
    ],
)
def test_a_command_line_that_is_wrong(words: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        run("data", *words)


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("data", "prepare", "--help")
    text = capsys.readouterr().out
    assert "hpcmp data prepare" in text and "--tokenizer tokenizer.json" in text and "what comes out" in text


def test_progress_on_a_terminal(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    words = ["data", "prepare", corpus, "--overwrite", "--output", tmp_path / "c.h5"]
    run(*words)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(data, "EVERY", 0.0)
    run(*words)
    assert "40 files" in capsys.readouterr().err
