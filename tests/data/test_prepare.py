"""``prepare``: what is in the file is what was in the text, and the file is there whole or not at all."""

from __future__ import annotations

import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcmp.data import ByteTokenizer, TokenFile, prepare
from hpcmp.data import corpus as corpus_module
from hpcmp.errors import InputError


def documents(path: Path) -> dict[str, list[str]]:
    """The text of every document of both splits, in order; checks how each is closed."""
    found = {}
    with TokenFile(path) as file:
        file.verify()
        for name in ("train", "valid"):
            split = file.split(name)
            ends = split.offsets(0, split.documents)
            ids = [split.read(int(a), int(b - a)) for a, b in zip(ends, ends[1:], strict=False)]
            assert all(i[-1] == file.end_of_document and file.end_of_document not in i[:-1] for i in ids)
            found[name] = [file.tokenizer.decode(i) for i in ids]
    return found


def texts(folder: Path) -> list[str]:
    return [p.read_text("utf-8") for p in sorted(folder.rglob("*.txt"), key=lambda p: p.relative_to(folder).parts)]


def test_every_document_is_there_once_and_in_order(corpus: Path, tmp_path: Path) -> None:
    made = prepare([corpus], tmp_path / "c.h5", held_out=0.25)
    found = documents(tmp_path / "c.h5")
    expected = texts(corpus)
    assert sorted(found["train"] + found["valid"]) == sorted(expected)
    for split in found.values():
        assert split and split == [t for t in expected if t in split]
    size = sum(len(t.encode()) for t in expected)
    assert (made.status, made.files, made.bytes, made.tokens) == ("written", 40, size, size + 40)
    for name, split in found.items():
        counts = made.splits[name]
        assert counts["documents"] == len(split) and counts["bytes"] == sum(len(t.encode()) for t in split)
        assert counts["tokens"] == counts["bytes"] + counts["documents"]


def test_the_same_tree_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    a = tmp_path / "a.h5"
    prepare([corpus], a)
    moved = corpus.rename(tmp_path / "elsewhere")
    b = tmp_path / "b.h5"
    prepare([moved], b)
    assert a.read_bytes() == b.read_bytes()


def test_smallest_dtype(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for vocabulary, dtype in ((256, "<u1"), (257, "<u2"), (65536, "<u2"), (65537, "<u4")):
        monkeypatch.setattr(ByteTokenizer, "vocabulary", vocabulary)
        monkeypatch.setattr(ByteTokenizer, "end_of_document", min(vocabulary - 1, 256))
        path = tmp_path / f"{vocabulary}.h5"
        prepare([corpus], path)
        with TokenFile(path) as file:
            assert file.split("train").dtype == np.dtype(dtype)
            assert file.split("train").read(0, 5).dtype == np.dtype(dtype)


def test_held_out_documents_stay_when_files_are_added(corpus: Path, tmp_path: Path) -> None:
    prepare([corpus], tmp_path / "a.h5", held_out=0.3)
    before = documents(tmp_path / "a.h5")
    for i in range(100):
        (corpus / "a" / f"new{i}.txt").write_text(f"new {i}")
    prepare([corpus], tmp_path / "b.h5", held_out=0.3)
    after = documents(tmp_path / "b.h5")
    assert [t for t in after["valid"] if not t.startswith("new")] == before["valid"]
    assert 0.2 < len(after["valid"]) / 140 < 0.4
    prepare([corpus], tmp_path / "c.h5", held_out=0.3, seed=1)
    assert documents(tmp_path / "c.h5")["valid"] != after["valid"]
    prepare([corpus], tmp_path / "d.h5", held_out=0)
    assert documents(tmp_path / "d.h5")["valid"] == []


def test_files_without_text_are_counted(corpus: Path, tmp_path: Path) -> None:
    expected = texts(corpus)
    (corpus / "empty").touch()
    (corpus / "image").write_bytes(b"\x89PNG\0\0")
    (corpus / "latin").write_bytes(b"caf\xe9")
    (corpus / "dead").symlink_to("gone")
    made = prepare([corpus], tmp_path / "c.h5")
    assert made.skipped == {"binary": 2, "empty": 1, "special": 1} and made.files == 40
    found = documents(tmp_path / "c.h5")
    assert sorted(found["train"] + found["valid"]) == sorted(expected)


def test_pieces_and_batches_do_not_show(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare([corpus], tmp_path / "whole.h5")
    monkeypatch.setattr(corpus_module, "PIECE", 8)
    monkeypatch.setattr(sys.modules["hpcmp.data.prepare"], "BATCH", 30)
    monkeypatch.setattr(sys.modules["hpcmp.data.hdf5"], "BLOCK", 7)
    prepare([corpus], tmp_path / "pieces.h5")
    assert (tmp_path / "whole.h5").read_bytes() == (tmp_path / "pieces.h5").read_bytes()


def test_a_document_of_no_tokens_is_no_document(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tokenizers make nothing of some text."""
    encode = ByteTokenizer.encode
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, t: encode(self, b"" if t.startswith(b"silent") else t))
    expected = sorted(texts(corpus))
    for i in range(3):
        (corpus / f"s{i}.txt").write_text("silent")
    made = prepare([corpus], tmp_path / "c.h5")
    assert made.files == 40 and made.skipped["empty"] == 3
    found = documents(tmp_path / "c.h5")
    assert sorted(found["train"] + found["valid"]) == expected


def test_a_subword_vocabulary(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts(corpus), trainer)
    source = tmp_path / "tokenizer.json"
    backend.save(str(source))
    prepare([corpus], tmp_path / "c.h5", source)
    definition = source.read_text("utf-8")
    source.unlink()  # the token file needs it no more
    found = documents(tmp_path / "c.h5")
    assert sorted(found["train"] + found["valid"]) == sorted(texts(corpus))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tokenizers", None)  # training needs the tokens, and the definition to pass on
        with TokenFile(tmp_path / "c.h5") as file:
            assert file.definition == definition
            with pytest.raises(InputError, match=r"tokenizer in .*c\.h5 needs .*hpcmp\[tokenizers\]"):
                _ = file.tokenizer


def test_again_does_nothing(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.h5"
    options: dict[str, Any] = {"held_out": 0.2, "include": ["*.txt"], "exclude": ["*7.txt"]}
    first = prepare([corpus], path, **options)
    stamp = path.stat()
    again = prepare([corpus], path, **options)
    assert again.status == "unchanged" and path.stat() == stamp
    assert {**again.as_dict(), "status": "written"} == first.as_dict()
    assert prepare([corpus], path, **options, overwrite=True).status == "written"


@pytest.mark.parametrize("change", ["content", "touched", "added", "removed", "held_out", "seed", "exclude"])
def test_an_output_from_other_files_or_options_is_kept(change: str, corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.h5"
    options: dict[str, Any] = {"held_out": 0.2}
    prepare([corpus], path, **options)
    before = path.read_bytes()
    file = corpus / "a" / "01.txt"
    match change:
        case "content":
            file.write_text("longer " * 100)
        case "touched":
            os.utime(file, ns=(0, 0))
        case "added":
            (corpus / "new").touch()
        case "removed":
            file.unlink()
        case "exclude":
            options["exclude"] = ["01.txt"]
        case name:
            options[name] = 0.3 if name == "held_out" else 3
    with pytest.raises(InputError, match="c.h5 exists and was made from other files or options: give --overwrite"):
        prepare([corpus], path, **options)
    assert path.read_bytes() == before
    assert prepare([corpus], path, **options, overwrite=True).status == "written"
    assert path.read_bytes() != before


def test_a_file_that_is_no_token_file_is_kept(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "thesis.tex"
    path.write_text("years of work")
    with pytest.raises(InputError, match="thesis.tex exists and is no good token file .*--overwrite"):
        prepare([corpus], path)
    assert path.read_text() == "years of work"


def test_a_damaged_output_is_not_taken_for_a_good_one(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.h5"
    prepare([corpus], path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(InputError, match="no good token file"):
        prepare([corpus], path)


def test_too_little_text_is_said(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("x" * 100)
    made = prepare([tmp_path / "one.txt"], tmp_path / "c.h5")
    assert any("train split is small: 101 tokens, for sequences of 100" in note for note in made.notes)
    assert any("valid split is empty: documents are held out whole" in note for note in made.notes)
    made = prepare([tmp_path / "one.txt"], tmp_path / "d.h5", held_out=0)
    assert not any("valid" in note for note in made.notes)  # as asked for
    with pytest.raises(InputError, match="nothing is left to train on: all 1 documents fell into the held-out split"):
        prepare([tmp_path / "one.txt"], tmp_path / "e.h5", held_out=0.999999)
    (tmp_path / "empty").touch()
    with pytest.raises(InputError, match="no text in the inputs .*1 empty.*patterns"):
        prepare([tmp_path / "empty"], tmp_path / "e.h5")
    with pytest.raises(InputError, match="no text in the inputs"):
        prepare([tmp_path], tmp_path / "e.h5", include=["*.md"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.h5", "d.h5", "empty", "one.txt"]


@pytest.mark.parametrize("share", [-0.1, 1.0, 5, float("nan")])
def test_a_share_that_is_none(share: float, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="held-out share"):
        prepare([corpus], tmp_path / "c.h5", held_out=share)


def test_bad_outputs(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder .*gone for the output c.h5"):
        prepare([corpus], tmp_path / "gone" / "c.h5")
    with pytest.raises(InputError, match="is also an input"):
        prepare([corpus / "a" / "01.txt"], corpus / "a" / "01.txt", overwrite=True)
    with pytest.raises(InputError, match="cannot write"):
        prepare([corpus], "/proc/c.h5")


def test_the_output_may_lie_among_the_inputs(corpus: Path) -> None:
    path = corpus / "c.h5"
    assert prepare([corpus], path).files == 40
    assert prepare([corpus], path).status == "unchanged"


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    peaks = []
    for megabytes in (8, 32):
        (tmp_path / "text").write_bytes(b"0123456789abcdef\n" * (megabytes * 60_000))
        tracemalloc.start()
        prepare([tmp_path / "text"], tmp_path / "c.h5", held_out=0, overwrite=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 40e6


def test_progress_is_told(corpus: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    made = prepare([corpus], tmp_path / "c.h5", progress=lambda *now: told.append(now))
    assert told[-1] == (made.files, made.bytes)
