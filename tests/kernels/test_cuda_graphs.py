"""``record``: what of some work's arrays has memory of its own; on a stand-in that captures on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcmp.kernels.cuda.graphs import record
from tests.kernels.emulation.capture import on_device


def test_what_outlives_the_work_has_memory_of_its_own() -> None:
    """Nothing runs before a replay; then what is handed on by an alias is good until the next graph."""
    with on_device() as device:
        x = np.zeros(3)

        def work() -> tuple[Any, Any]:
            between = np.add(x, 1)
            kept = np.add(between, between)
            return kept, device.alias(np.multiply(kept, between))

        first = record(device, work)
        second = record(device, work, first.kept)
        assert device.captures == 3 and first.kept == second.kept == {1}
        assert np.isnan(first.result[0]).all() and np.isnan(first.result[1]).all()
        first.graph.launch()
        np.testing.assert_array_equal(first.result[0], np.full(3, 2))
        np.testing.assert_array_equal(first.result[1], np.full(3, 2))
        x[...] = 4
        second.graph.launch()
        np.testing.assert_array_equal(first.result[0], np.full(3, 2))
        np.testing.assert_array_equal(first.result[1], second.result[1])  # both lie in scratch memory
        np.testing.assert_array_equal(second.result[0], np.full(3, 10))
        assert all(len(free) * 512 == sum(map(len, free)) for free in device.scratch.free.values())


def test_work_that_is_not_the_same_each_time_is_refused() -> None:
    kept = []

    def work() -> None:
        kept.append([np.empty(3) for _ in range(len(kept))])

    with on_device() as device, pytest.raises(RuntimeError, match="something else each time"):
        record(device, work)


def test_memory_that_a_library_keeps_is_not_scratch() -> None:
    """Made within the first capture, it is no part of the others."""
    workspace: list[Any] = []

    def work() -> Any:
        first = np.empty(3)
        if not workspace:
            workspace.append(np.empty(3))
        np.add(workspace[0], 1, out=first)
        return np.add(first, 1)

    with on_device() as device:
        made = record(device, work)
        assert device.captures == 3 and made.kept == {1}
        workspace[0][...] = 5
        for _ in range(2):
            made.graph.launch()
            np.testing.assert_array_equal(made.result, np.full(3, 7))
            workspace[0][...] = 5
