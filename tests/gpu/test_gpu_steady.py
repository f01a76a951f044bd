"""The steady state of training on a GPU: the host queues a step while the one before runs, and waits for no number."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from hpcmp.arrays import to_host
from hpcmp.training.config import load_config
from hpcmp.training.trainer import Trainer
from hpcmp.training.verify import source_of
from tests.corpus import config, corpus
from tests.layouts import engine, small

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"name": "sgd"},
        {"name": "lamb"},
        {"name": "muon"},
        {"dtype": "bfloat16", "style": "llama"},
        {"dtype": "float16"},
    ],
    ids=str,
)
def test_a_step_is_queued_while_the_gpu_does_nothing(values: dict[str, Any]) -> None:
    """The stream is closed by a gate; had the host to wait for anything behind it, the gate would open by the clock."""
    import cupy

    c = small(device="cuda", layers=1, **values)
    source, opened = source_of(c), threading.Event()
    with engine(c) as e:
        for i in range(0, 4, 2):  # kernels are compiled, and memory is in the pools
            running = [e.begin(i + k, *source(i + k, e.share)) for k in range(2)]
            assert all(each.result().sound for each in running)
        clock = threading.Timer(60, opened.set)
        clock.start()
        cupy.cuda.get_current_stream().launch_host_func(lambda _: opened.wait(), None)
        running = e.begin(4, *source(4, e.share), stop=True, tell=True)
        waited = opened.is_set()
        opened.set()
        result = running.result()
        clock.cancel()
    assert not waited and result.sound and result.stop and result.tell


def test_a_run_ahead_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    toml, found = config(tmp_path, corpus(tmp_path)), []
    for ahead in (0, 1):
        given = [f"run.directory={tmp_path / str(ahead)}", "train.device=cuda", f"train.ahead={ahead}"]
        with Trainer(load_config(toml, [*given, "run.evaluate_every=4"])) as t:
            summary = t.train()
            weights = [to_host(bucket.master) for bucket in t.engine.buckets.buckets]
        found.append((summary["loss"], summary["held_out_loss"], weights))
    assert found[0][:2] == found[1][:2]
    assert all((x == y).all() for x, y in zip(found[0][2], found[1][2], strict=True))


def test_a_step_that_is_no_good_and_the_one_behind_it_change_nothing() -> None:
    c = small(device="cuda")
    source = source_of(c)
    with engine(c) as e:
        e.step(0, *source(0, e.share))
        before = [to_host(bucket.master) for bucket in e.buckets.buckets]
        squares = e.buckets.add_squares

        def bad(total: Any) -> None:
            squares(total)
            total *= float("nan")

        e.buckets.add_squares = bad  # type: ignore[method-assign]
        first = e.begin(1, *source(1, e.share))
        e.buckets.add_squares = squares  # type: ignore[method-assign]
        e.begin(2, *source(2, e.share))
        assert "computed again, all is finite" in first.result().trouble
        for bucket, master in zip(e.buckets.buckets, before, strict=True):
            assert (to_host(bucket.master) == master).all()
        assert e.optimizer.steps == 1 and e.step(2, *source(2, e.share)).sound
        assert any((to_host(b.master) != m).any() for b, m in zip(e.buckets.buckets, before, strict=True))
