"""Tokenizers: what comes back is what went in, and a definition rebuilds the same tokenizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from hpcmp.data import ByteTokenizer, Tokenizer, load_tokenizer, tokenizer_from
from hpcmp.errors import InputError

TEXT = "def f(x):\n    return x + 1  # naïve, 文字, 🙂\n"


@pytest.fixture(scope="module")
def json_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE vocabulary of 300 ids trained on a few lines, with truncation and padding switched on."""
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT] * 10, trainer)
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    backend.save(str(path))
    return path


def check(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert ids.dtype.kind == "u" and ids.ndim == 1 and ids.max() < tokenizer.vocabulary
    assert tokenizer.end_of_document < tokenizer.vocabulary and tokenizer.end_of_document not in ids
    batch = tokenizer.encode_batch([TEXT.encode(), b"", b"x"])
    assert [tokenizer.decode(b) for b in batch] == [TEXT, "", "x"]
    assert [len(b) for b in batch] == [len(ids), 0, 1]  # nothing cut, nothing padded
    again = tokenizer_from(tokenizer.definition)
    assert (again.name, again.vocabulary, again.end_of_document) == (
        tokenizer.name,
        tokenizer.vocabulary,
        tokenizer.end_of_document,
    )
    np.testing.assert_array_equal(again.encode(TEXT.encode()), ids)


def test_bytes() -> None:
    tokenizer = load_tokenizer("bytes")
    check(tokenizer)
    assert (tokenizer.vocabulary, tokenizer.end_of_document) == (257, 256)
    np.testing.assert_array_equal(tokenizer.encode(bytes(range(256))), np.arange(256))


def test_bytes_decode_what_a_model_may_say() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([104, 105, 256, 300, -1]) == "hi"
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_hugging_face(json_path: Path) -> None:
    tokenizer = load_tokenizer(json_path)
    check(tokenizer)
    assert 258 < tokenizer.vocabulary <= 300 and tokenizer.end_of_document == 1
    assert tokenizer.name.startswith("bpe-")
    assert load_tokenizer(json_path.parent).name == tokenizer.name  # a folder that holds a tokenizer.json


def test_special_tokens_spelled_out_are_text(json_path: Path) -> None:
    tokenizer = load_tokenizer(json_path)
    ids = tokenizer.encode(b"a<|endoftext|>b")
    assert tokenizer.end_of_document not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_end_of_document_is_added_where_the_vocabulary_has_none() -> None:
    pytest.importorskip("tokenizers")
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 7}, "unk_token": "a"}
    tokenizer = tokenizer_from(json.dumps({"version": "1.0", "model": model}))
    assert (tokenizer.end_of_document, tokenizer.vocabulary) == (8, 9)  # after the largest id, not the number of ids
    assert tokenizer.decode([7, 8]) == "b"


def test_missing_package(json_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r'pip install "hpcmp\[tokenizers\]"'):
        load_tokenizer(json_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"model": {"type": "BPE"}}', b"\xff\xfe", b"null"])
def test_damaged_json(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.json.*tokenizer\.json") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_cut_short_json(json_path: Path, tmp_path: Path) -> None:
    whole = json_path.read_bytes()
    path = tmp_path / "cut.json"
    for length in range(1, len(whole), len(whole) // 20):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="cut.json"):
            load_tokenizer(path)


def test_no_such_tokenizer() -> None:
    with pytest.raises(InputError, match="no tokenizer 'byte'"):
        load_tokenizer("byte")


def test_text_the_vocabulary_cannot_hold() -> None:
    pytest.importorskip("tokenizers")
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "missing"}
    tokenizer = tokenizer_from(json.dumps({"version": "1.0", "model": model}), "words.json")
    with pytest.raises(InputError, match="words.json cannot encode"):
        tokenizer.encode(b"zebra")
