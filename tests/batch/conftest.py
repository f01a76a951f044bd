"""A fixture of these tests: programs of schedulers."""

from __future__ import annotations

from pathlib import Path

import pytest

from .fakes import Programs, enter


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """No programs yet; this process is in no job."""
    made = Programs(tmp_path / "bin")
    enter(monkeypatch, {"PATH": made.path})
    return made
