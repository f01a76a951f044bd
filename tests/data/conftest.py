"""A small corpus and the token file made from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hpcmp.data import TokenFile, prepare


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty short documents in two folders, ASCII and other scripts, each different."""
    folder = tmp_path / "corpus"
    for i in range(40):
        path = folder / ("a" if i % 3 else "b") / f"{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {i}\n" + "wörter und 文字 " * (i % 5 + 1) + "\n" * (i % 2), "utf-8")
    return folder


@pytest.fixture
def token_path(corpus: Path, tmp_path: Path) -> Path:
    path = tmp_path / "corpus.h5"
    prepare([corpus], path, held_out=0.2)
    return path


@pytest.fixture
def token_file(token_path: Path) -> Iterator[TokenFile]:
    with TokenFile(token_path) as file:
        yield file


@pytest.fixture(scope="session")
def long_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token file with no two equal windows: 60,000 pseudo-random letters in several documents."""
    folder = tmp_path_factory.mktemp("long")
    letters = np.random.default_rng(0).integers(97, 123, 60_000).astype(np.uint8)
    for i, part in enumerate(np.split(letters, 20)):
        (folder / f"{i:02d}.txt").write_bytes(part.tobytes())
    path = folder / "long.h5"
    prepare([folder], path, held_out=0.2)
    return path


@pytest.fixture
def long_file(long_path: Path) -> Iterator[TokenFile]:
    with TokenFile(long_path) as file:
        yield file
