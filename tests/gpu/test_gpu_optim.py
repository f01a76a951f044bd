"""Optimizers whose step depends on norms of their own: these stay on the GPU."""

from __future__ import annotations

import threading

import pytest

from hpcmp.training.verify import source_of
from tests.layouts import engine, small

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.mark.parametrize("name", ["lamb", "muon"])
def test_an_update_is_queued_while_the_gpu_does_nothing(name: str) -> None:
    """The stream is closed by a gate; had the host to wait for anything behind it, the gate would open by the clock."""
    import cupy

    c = small(device="cuda", layers=1, name=name)
    source, opened = source_of(c), threading.Event()
    with engine(c) as e:
        for i in range(2):  # kernels are compiled, and memory is in the pools
            assert e.step(i, *source(i, e.share)).sound
        clock = threading.Timer(60, opened.set)
        clock.start()
        cupy.cuda.get_current_stream().launch_host_func(lambda _: opened.wait(), None)
        e.optimizer.update(0.1, 1.0)
        waited = opened.is_set()
        opened.set()
        cupy.cuda.get_current_stream().synchronize()
        clock.cancel()
    assert not waited
