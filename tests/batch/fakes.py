"""Programs of schedulers that are not there: each writes down how it was called, and does as it is told."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest

from hpcmp.batch import SCHEDULERS

RECORDED = Path(__file__).parent / "recorded"
SLURM = {"SLURM_JOB_ID": "4711", "SLURM_CLUSTER_NAME": "alps"}
#: Whose values say what job a process is in, or how to run it again.
VARIABLES = {*SCHEDULERS.values(), "SLURM_JOB_END_TIME", "HPCMP_RESUBMIT"}


class Programs:
    """Programs in ``folder``, which goes before the rest of PATH; calls: the command lines so far, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._calls = folder, folder / "calls"
        folder.mkdir()

    def add(self, name: str, body: str) -> None:
        """``body``: lines of the shell."""
        note = f'{{ printf %s {name}; for a; do printf "\\t%s" "$a"; done; echo; }} >> {shlex.quote(str(self._calls))}'
        (self.folder / name).write_text(f"#!/bin/sh\n{note}\n{body}\n")
        (self.folder / name).chmod(0o755)

    @property
    def calls(self) -> list[list[str]]:
        return [line.split("\t") for line in self._calls.read_text().splitlines()] if self._calls.exists() else []

    @property
    def path(self) -> str:
        """The value of PATH."""
        return f"{self.folder}{os.pathsep}{os.environ['PATH']}"


def enter(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> None:
    """Put this process into the job of ``variables``, and out of any other."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
