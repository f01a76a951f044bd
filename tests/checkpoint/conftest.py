"""Fixtures for the tests of checkpoints."""

from __future__ import annotations

import pytest

from hpcmp.checkpoint import lock


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks with a sign of life every twentieth of a second, and little patience."""
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "MISSED", 5)
    monkeypatch.setattr(lock, "_TRIES", 10)
    monkeypatch.setattr(lock, "_silent", set())
