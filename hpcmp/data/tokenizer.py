"""Text to token ids and back. A tokenizer is described by one string, its definition, which travels with the data.

``ByteTokenizer`` is built in; ``HuggingFaceTokenizer`` reads a ``tokenizer.json`` with the ``tokenizers`` package (an
optional extra). The definition (``"bytes"``, or the text of the ``tokenizer.json``) is stored in the token file and
from there in checkpoints, so that text can be generated long after the original file was moved or changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

#: Names under which well-known tokenizers hold their end-of-document token, looked up in this order.
END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>", "<EOS>", "[SEP]")


class Tokenizer(Protocol):
    """A map from text to ids in ``[0, vocabulary)``; ``end_of_document`` is an id that no text encodes to.

    ``name`` tells tokenizers apart (equal names, equal ids), ``definition`` rebuilds this one: ``tokenizer_from``.
    """

    name: str
    definition: str
    vocabulary: int
    end_of_document: int

    def encode(self, text: bytes) -> NDArray[Any]:
        """The ids of UTF-8 ``text``: shape (tokens,), unsigned. No end-of-document token is added."""
        ...

    def encode_batch(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        """``encode`` of each text, on all cores where the tokenizer can."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``. Ids that stand for no text (end of document, unused ids) are left out."""
        ...


class ByteTokenizer:
    """Token = byte value 0..255, end of document = 256. Any text, no file, no vocabulary to train."""

    name = "bytes"
    definition = "bytes"
    vocabulary = 257
    end_of_document = 256

    def encode(self, text: bytes) -> NDArray[Any]:
        return np.frombuffer(text, np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if 0 <= i < 256).decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` as the Hugging Face ``tokenizers`` package writes it.

    Text is only text: a special token spelled out in a document ("<|endoftext|>") is encoded letter by letter, and the
    file's own truncation and padding, meant for inference, are off. The end-of-document token is the first of
    ``END_OF_DOCUMENT_NAMES`` in the vocabulary; where there is none, one id is added after the last.

    Raises InputError naming the file if it is missing or no tokenizer, or if the package is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        try:
            text = path.read_text("utf-8")
        except OSError as error:
            raise InputError(f"cannot read tokenizer {path}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise InputError(f"{path} is not a tokenizer.json: it is not UTF-8 text") from None
        self._build(text, str(path))

    @classmethod
    def from_definition(cls, definition: str, source: str = "tokenizer") -> HuggingFaceTokenizer:
        """The tokenizer of a stored definition; ``source`` is what an error names."""
        self = cls.__new__(cls)
        self._build(definition, source)
        return self

    def _build(self, definition: str, source: str) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise InputError(
                f'{source} needs the tokenizers package: pip install "hpcmp[tokenizers]" (or use --tokenizer bytes)'
            ) from None
        try:
            backend = Backend.from_str(definition)
        except Exception as error:  # the package raises plain Exception for every kind of damage
            raise InputError(f"{source} is not a readable tokenizer.json: {first_line(error)}") from None
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        ids: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        used = max(ids.values(), default=-1) + 1  # not len(ids): some files skip ids
        if not 0 < used < 2**31:
            raise InputError(f"{source} has a vocabulary of {used} ids, outside 1 to 2^31 - 1")
        self._backend = backend
        self._used = used
        self._source = source
        self.definition = definition
        self.name = f"{type(backend.model).__name__.lower()}-{digest(definition)[:12]}"
        self.end_of_document = next((ids[name] for name in END_OF_DOCUMENT_NAMES if name in ids), used)
        self.vocabulary = max(used, self.end_of_document + 1)

    def encode(self, text: bytes) -> NDArray[Any]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        try:
            encodings = self._backend.encode_batch_fast([t.decode("utf-8") for t in texts], add_special_tokens=False)
        except Exception as error:  # such as text outside a vocabulary that has no token for the unknown
            raise InputError(f"{self._source} cannot encode the text: {first_line(error)}") from None
        return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._backend.decode([i for i in map(int, ids) if 0 <= i < self._used], skip_special_tokens=True)
        return text


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """``"bytes"``, or the path of a ``tokenizer.json`` (or of a folder that holds one)."""
    if spec == ByteTokenizer.name:
        return ByteTokenizer()
    path = Path(spec)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.exists():
        raise InputError(f'no tokenizer {str(spec)!r}: give "bytes" or the path of a tokenizer.json')
    return HuggingFaceTokenizer(path)


def tokenizer_from(definition: str, source: str = "stored tokenizer") -> Tokenizer:
    """The tokenizer of a definition that a token file or a checkpoint holds; ``source`` is what an error names."""
    if definition == ByteTokenizer.definition:
        return ByteTokenizer()
    return HuggingFaceTokenizer.from_definition(definition, source)


def digest(definition: str) -> str:
    """SHA-256 of a definition, in hex."""
    return hashlib.sha256(definition.encode()).hexdigest()


def first_line(error: BaseException) -> str:
    """What ``error`` says, as one line."""
    return (str(error) or type(error).__name__).splitlines()[0]
