"""Fault: a data file that is changed, cut or replaced while a run reads it is refused with its name and the place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcmp.data.tokens import TokenFile
from hpcmp.errors import DataError
from tests.corpus import corpus


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return corpus(tmp_path_factory.mktemp("corpus")).read_bytes()


@pytest.fixture
def data(tmp_path: Path, made: bytes) -> Path:
    path = tmp_path / "tokens.h5"
    path.write_bytes(made)
    os.utime(path, (1, 1))
    return path


@pytest.mark.fault(20)
def test_a_file_written_in_place_is_refused(data: Path) -> None:
    with TokenFile(data) as file:
        split = file.split("train")
        split.read(3, 4)
        with data.open("r+b") as other:
            other.seek(-1, os.SEEK_END)
            other.write(b"\0")
        with pytest.raises(DataError, match=rf"{data}: train/tokens\[5:9\]: the file has been changed since"):
            split.read(5, 4)


@pytest.mark.fault(20)
def test_a_file_cut_short_is_refused(data: Path) -> None:
    with TokenFile(data) as file:
        split = file.split("train")
        os.truncate(data, data.stat().st_size // 2)
        with pytest.raises(DataError, match=rf"{data}: train/tokens\[\d+:\d+\]: "):
            split.read(len(split) - 4, 4)


def test_a_file_replaced_by_another_is_read_to_its_end(data: Path) -> None:
    with TokenFile(data) as file:
        before = file.split("train").read(0, 50).tolist()
        new = data.with_name("new")
        new.write_bytes(b"another")
        new.replace(data)
        assert file.split("train").read(0, 50).tolist() == before
