"""A fixture of these tests: a configuration, in a directory of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs.cluster import CONFIG


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of a configuration whose layout needs a multiple of 4 ranks, in the current directory."""
    monkeypatch.chdir(tmp_path)
    Path("gpt.toml").write_text(CONFIG)
    return "gpt.toml"
