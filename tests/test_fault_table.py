"""Each fault of docs/faults.md has the tests that its row names, and those that are tried on MPICH are marked so."""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
MARKED = {*range(9, 21), 23}  # those that happen to ranks while they run, on both MPIs; the others to files


class Row(NamedTuple):
    """Of the table: the test files of a fault, and the MPIs that they have been run on."""

    files: set[str]
    mpis: str


def rows() -> dict[int, Row]:
    found = {}
    for line in (ROOT / "docs" / "faults.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].isdigit():
            found[int(cells[0])] = Row({f"tests/{name}" for name in re.findall(r"`([\w/]+\.py)`", cells[3])}, cells[4])
    return found


def sources() -> dict[str, str]:
    return {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "tests").rglob("test_*.py"))}


@functools.cache
def marks(text: str) -> set[int]:
    """The numbers N of every ``pytest.mark.fault(N)`` in a source."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    found = [call.args for call in calls if ast.unparse(call.func) == "pytest.mark.fault"]
    return {ast.literal_eval(argument) for arguments in found for argument in arguments}


def files(texts: Mapping[str, str]) -> dict[int, set[str]]:
    """The files that have tests marked with each number."""
    found: dict[int, set[str]] = defaultdict(set)
    for name, text in texts.items():
        for number in marks(text) if ".fault(" in text else ():
            found[number].add(name)
    return dict(found)


def check(texts: Mapping[str, str]) -> None:
    marked, told = files(texts), rows()
    assert set(marked) == MARKED
    for number, row in told.items():
        assert row.files and row.files <= set(texts), number
        assert (row.mpis == "Open MPI, MPICH") is (number in MARKED), number
        assert number not in MARKED or row.files == marked[number], number


def test_every_fault_has_tests_and_its_row_names_them() -> None:
    assert set(rows()) == {*range(1, 24)}
    check(sources())


@pytest.mark.parametrize("number", sorted(MARKED))
def test_a_fault_whose_tests_are_taken_away_is_noticed(number: int) -> None:
    texts = sources()
    for name in files(texts)[number]:
        fewer = {key: text for key, text in texts.items() if key != name}
        with pytest.raises(AssertionError):
            check(fewer)
    with pytest.raises(AssertionError):
        check({name: without(number, text) for name, text in texts.items()})


def without(number: int, text: str) -> str:
    """A source without this number in its marks."""
    return re.sub(r"(?<=\.fault\().*?(?=\))", lambda m: re.sub(rf"\b{number}\b(, )?", "", m[0]), text)
