"""Fixtures for every test, and the plugin that runs the tests marked ``mpi`` on several ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from subprocess import CompletedProcess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytest_plugins = ["tests.harness.plugin", "tests.harness.mpich"]


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Intracomm:
    """``MPI.COMM_WORLD``, for tests marked ``mpi``. A folder that all ranks share is pytest-mpi's ``mpi_tmp_path``."""
    if request.node.get_closest_marker("mpi") is None:
        pytest.fail("the fixture `world` is for tests marked mpi: @pytest.mark.mpi", pytrace=False)
    from mpi4py import MPI

    return MPI.COMM_WORLD


@pytest.fixture
def run_mpi() -> Callable[..., CompletedProcess[str]]:
    """``run_mpi(ranks, argv, timeout=60, env=None, cwd=None)`` launches a program under mpirun from a serial test."""
    from tests.harness import launch

    return launch.run_mpi


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not gpu_present():
        pytest.skip("no GPU")


@functools.cache
def gpu_present() -> bool:
    """Whether CuPy is installed and finds a device."""
    try:
        import cupy

        return bool(cupy.is_available())
    except ImportError:
        return False
