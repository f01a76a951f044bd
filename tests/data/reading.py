"""What the tests of token files share: all that a reader sees of one, and how one is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpcmp.data import TokenFile
from hpcmp.errors import DataError


def everything(path: Path) -> tuple[Any, ...]:
    """All that a reader can see of a token file."""
    with TokenFile(path) as file:
        file.verify()
        splits = [file.split(name) for name in ("train", "valid")]
        return (
            [s.read(0, len(s)).tobytes() for s in splits],
            [s.offsets(0, s.documents).tobytes() for s in splits],
            [(s.documents, s.bytes, s.digest, str(s.dtype)) for s in splits],
            (file.vocabulary, file.end_of_document, file.definition, file.tokenizer_name, file.inputs, file.counts),
        )


def refused(path: Path, match: str, *, on: Callable[[TokenFile], object] = lambda file: None) -> None:
    """Opening ``path``, or what is done then, raises a DataError of one line that names the file."""
    with pytest.raises(DataError, match=match) as caught, TokenFile(path) as file:
        on(file)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
