"""The pass on MPICH: ``tests/run.sh`` runs the tests marked ``fault`` a second time, by an interpreter that has MPICH.

It says so by HPCMP_TEST_MPICH. Then no other test is run, and the summary has a line of its own for ``.ci/run``.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

ON = bool(os.environ.get("HPCMP_TEST_MPICH"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests marked ``fault``."""
    if ON:
        config.hook.pytest_deselected(items=[item for item in items if not item.get_closest_marker("fault")])
        items[:] = [item for item in items if item.get_closest_marker("fault")]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what became of them."""
    if ON:
        stats = {name: len(terminalreporter.getreports(name)) for name in ("passed", "failed", "error", "skipped")}
        told = ", ".join(f"{count} {name}" for name, count in stats.items() if count)
        terminalreporter.write_line(f"mpich: {told or 'no test of a fault'}")
