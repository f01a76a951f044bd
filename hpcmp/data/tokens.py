"""Token files: one HDF5 file with the tokens of a corpus, a training and a held-out split, and its tokenizer.

    /                  format "hpcmp-tokens", version, tokenizer (its name), vocabulary, end_of_document, counts
    /tokenizer         the tokenizer's definition, uint8 text; attribute sha256
    /train/tokens      the tokens of all documents, one after the other, each document closed by end_of_document
    /train/documents   int64, documents + 1 offsets: document i is tokens[documents[i] : documents[i + 1]]
    /valid/...         the same for the held-out documents

Tokens have the smallest unsigned dtype that holds the vocabulary. Each dataset carries a ``digest`` of its elements.
Any HDF5 tool reads the file. A token file never changes once it has its name; ``prepare`` writes it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..hdf5 import Hdf5File
from . import hdf5
from .corpus import SKIPPED
from .tokenizer import Tokenizer, tokenizer_from

FORMAT = "hpcmp-tokens"
VERSION = 1
TOKENIZER = 64 << 20  # bytes of a tokenizer at most, which is read whole
SPLITS = ("train", "valid")
#: What the file counts, over both splits: files taken, bytes of text, and files left out by reason.
COUNTS = ("files", "bytes", *(f"skipped_{reason}" for reason in SKIPPED))


class Split:
    """The tokens of one split: ``len(split)`` tokens, of which any slice can be read.

    ``name`` is "FILE: train" for messages, ``digest`` identifies the tokens, ``documents`` and ``bytes`` count the
    documents and their text in bytes.
    """

    def __init__(self, file: Hdf5File, name: str, vocabulary: int) -> None:
        self.name = f"{file.path}: {name}"
        self.vocabulary = vocabulary
        self._tokens = hdf5.Column(file, f"{name}/tokens", ("<u1", "<u2", "<u4"))
        self._offsets = hdf5.Column(file, f"{name}/documents", ("<i8",))
        self.dtype: np.dtype[Any] = self._tokens.dtype
        self.digest = self._tokens.text("digest")
        self.documents = file.integer(name, "documents")
        self.bytes = file.integer(name, "bytes")
        if len(self) != file.integer(name, "tokens") or self._offsets.size != self.documents + 1:
            raise DataError(f"{self.name} is damaged: its counts of tokens and documents differ from its arrays")
        ends = (*self._offsets.read(0, 1), *self._offsets.read(self.documents, self.documents + 1))
        if ends != (0, len(self)):
            raise DataError(
                f"{self.name}/documents is damaged: it runs from {ends[0]} to {ends[1]}, not 0 to {len(self)}"
            )

    def __len__(self) -> int:
        return self._tokens.size

    def read(self, start: int, count: int) -> NDArray[Any]:
        """Tokens ``start`` to ``start + count``, shape (count,), in the file's dtype; nothing else is read.

        Raises DataError naming file and place if they cannot be read or one is outside the vocabulary.
        """
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"{self.name} has {len(self)} tokens, not {start} to {start + count}")
        tokens = self._tokens.read(start, start + count)
        if count and int(tokens.max()) >= self.vocabulary:
            at = int(np.argmax(tokens >= self.vocabulary))
            raise DataError(
                f"{self.name}/tokens is damaged: token {start + at} is {tokens[at]}, outside the vocabulary of "
                f"{self.vocabulary}"
            )
        return tokens

    def offsets(self, first: int, count: int) -> NDArray[Any]:
        """Where documents ``first`` to ``first + count`` begin, and where the last ends: int64, shape (count + 1,)."""
        if first < 0 or count < 0 or first + count > self.documents:
            raise IndexError(f"{self.name} has {self.documents} documents, not {first} to {first + count}")
        offsets = self._offsets.read(first, first + count + 1)
        if (np.diff(offsets) <= 0).any() or offsets[0] < 0 or offsets[-1] > len(self):
            raise DataError(f"{self.name}/documents is damaged: offsets from {first} on do not increase")
        return offsets

    def verify(self) -> None:
        """Go through every token and offset: values in range, digests as written. Raises DataError if not."""
        digest = hdf5.new_digest()
        for start in range(0, len(self), hdf5.BLOCK):
            digest.update(self.read(start, min(hdf5.BLOCK, len(self) - start)))
        if digest.hexdigest() != self.digest:
            raise DataError(f"{self.name}/tokens is damaged: its digest is not the one stored when it was written")
        digest = hdf5.new_digest()
        for first in range(0, self.documents, hdf5.BLOCK):
            digest.update(self.offsets(first, min(hdf5.BLOCK, self.documents - first))[:-1])
        digest.update(self._offsets.read(self.documents, self.documents + 1))
        if digest.hexdigest() != self._offsets.text("digest"):
            raise DataError(f"{self.name}/documents is damaged: its digest is not the one stored when it was written")


class TokenFile:
    """A token file, opened for reading and checked: format, dtypes, sizes, and that all of it lies in this one file.

    Opening reads a few kilobytes, whatever the size of the corpus; ``verify`` reads everything. Every rank may open the
    same file. Use as a context manager, or ``close`` it.

    Raises DataError, naming the file and what is wrong with it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = hdf5.open_file(self.path, FORMAT)
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        file, path = self._file, self.path
        version = file.integer("", "version")
        if version != VERSION:
            raise DataError(
                f"{path} has format version {version}, this hpcmp reads version {VERSION}: prepare it again"
            )
        self.vocabulary = file.integer("", "vocabulary")
        self.end_of_document = file.integer("", "end_of_document")
        self.tokenizer_name = file.text("", "tokenizer")
        self.inputs = file.text("", "inputs")
        self.counts = {name: file.integer("", name) for name in COUNTS}
        if not self.end_of_document < self.vocabulary < 2**31:
            raise DataError(f"{path} is damaged: end of document {self.end_of_document}, vocabulary {self.vocabulary}")
        self._splits = {name: Split(file, name, self.vocabulary) for name in SPLITS}
        self._definition = hdf5.Column(file, "tokenizer", ("|u1",))

    @property
    def definition(self) -> str:
        """The stored tokenizer as one string, for ``tokenizer_from``; needs no tokenizer package."""
        if self._definition.size > TOKENIZER:
            raise DataError(f"{self.path}: tokenizer is longer than {TOKENIZER} bytes")
        raw = self._definition.read(0, self._definition.size).tobytes()
        if hashlib.sha256(raw).hexdigest() != self._definition.text("sha256"):
            raise DataError(f"{self.path}: tokenizer is damaged: its digest is not the one stored when it was written")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{self.path}: tokenizer is not UTF-8 text") from None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        return tokenizer_from(self.definition, f"the tokenizer in {self.path}")

    def split(self, name: str) -> Split:
        """The split ``"train"`` or ``"valid"``."""
        if name not in self._splits:
            raise KeyError(f"a token file has the splits {' and '.join(SPLITS)}, not {name!r}")
        return self._splits[name]

    def verify(self) -> None:
        """Read the whole file and compare it with its digests. Raises DataError naming what is damaged."""
        for split in self._splits.values():
            split.verify()
        _ = self.definition

    def close(self) -> None:
        """Close the file; may be called again."""
        self._file.close()

    def __enter__(self) -> TokenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
