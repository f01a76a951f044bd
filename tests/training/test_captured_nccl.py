"""Captured blocks that communicate by NCCL, over a model of it: the bits and the books of a run without graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp import captured
from hpcmp.captured import Captured, Graphs
from hpcmp.comm.lanes import Done, Lane
from hpcmp.comm.recorder import RECORDER
from hpcmp.errors import InputError
from hpcmp.training.config import Config
from hpcmp.training.verify import source_of
from tests.kernels.emulation.backend import needs_gxx
from tests.kernels.emulation.capture import on_device
from tests.kernels.emulation.nccl import over_nccl
from tests.layouts import engine, spread
from tests.test_captured import differences, tiny, train, with_graphs

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = [needs_gxx, pytest.mark.timeout(300)]  # g++ builds what has changed


def on(*ranks: int) -> Callable[[Any], Any]:
    """A test on these numbers of ranks."""

    def marked(test: Any) -> Any:
        for number in ranks:
            test = pytest.mark.mpi(size=number)(test)
        return test

    return marked


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp={n},sp=1,micro=2": {"sequence": 7, "layers": 2},
    "tp={n},sp=0,micro=2,recompute=full": {"style": "llama", "dropout": 0.3},
    "tp={n},sp=1,micro=1,schedule=zb-h1": {"style": "llama", "sequence": 9, "dropout": 0.3},
    "tp_y={n},micro=2": {"style": "llama"},
    "cp={n},ulysses={n},micro=1": {"sequence": 9, "heads": 4, "kv_heads": 4, "dropout": 0.3},
}


FOUR = (
    *("tp=4,sp=1,micro=1,schedule=zb-h1", "tp=2,pp=2,sp=1,micro=1,schedule=1f1b"),
    *("tp=2,dp=2,micro=1", "tp=2,tp_y=2,micro=2"),
)


@on(2, 3)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits(world: Intracomm, layout: str) -> None:
    with over_nccl():
        assert not differences(spread(tiny(**{"layers": 1} | LAYOUTS[layout]), layout.format(n=world.size)), world)


@on(4)
@pytest.mark.parametrize("layout", FOUR)
def test_four_ranks(world: Intracomm, layout: str) -> None:
    """With stages and replicas, too, whose messages and sums are in no graph."""
    config = tiny(layers=2, sequence=7, dropout=0.3, bucket_mb=2e-4)
    with over_nccl():
        assert not differences(spread(config, layout), world)


def small(world: Intracomm) -> Config:
    return with_graphs(spread(tiny(sequence=7, layers=1), f"tp={world.size},sp=1,micro=1"))


def kept(config: Config, world: Intracomm) -> tuple[Any, ...]:
    """The numbers of some steps, and what the communicator of tp counts and records."""
    RECORDER.keep(None)
    before = len(RECORDER.records)
    try:
        with over_nccl(), on_device() as device, engine(config, world) as e:
            assert bool(e.mesh._checks) == config.train.check_collectives
            found, traffic = train(e, config), dict(e.parallel.tp.traffic)
            seen = [r for r in list(RECORDER.records)[before:] if r.flight.axes == "tp"]
            calls = Counter((r.operation, r.count, r.site) for r in seen)
            assert [r.sequence for r in seen] == list(range(len(seen)))
            RECORDER.snapshot()
            assert all(r.end is not None and not r.failed for r in seen)
            assert bool(device.graphs) == config.train.cuda_graphs
    finally:
        RECORDER.keep()
    return found, traffic, calls


@on(2, 3)
@pytest.mark.parametrize("check", [False, True])
def test_what_runs_in_graphs_is_counted_recorded_and_checked(world: Intracomm, check: bool) -> None:
    config = spread(tiny(sequence=7, layers=1, check_collectives=check), f"tp={world.size},sp=1,micro=2,schedule=gpipe")
    wanted, found = kept(config, world), kept(with_graphs(config), world)
    assert wanted[1:] == found[1:] and wanted[1]
    assert all(np.array_equal(x, found[0][name]) for name, x in wanted[0].items())
    assert any("layers/linear.py" in site for _, _, site in found[2])


@on(2, 3)
def test_all_ranks_capture_or_none(world: Intracomm) -> None:
    """A rank without a position of the sequence has nothing to capture, and the others communicate with it."""
    config = with_graphs(spread(tiny(sequence=world.size - 1, layers=1), f"tp={world.size},sp=1,micro=1"))
    with over_nccl(), on_device() as device, engine(config, world) as e:
        train(e, config)
        assert not device.captures
        assert e.graphs is not None and e.graphs.agreed(True) and not e.graphs.agreed(world.rank > 0)


@on(2, 3)
def test_all_ranks_capture_equally_often(world: Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one of them finds out later than others which arrays last."""
    config = small(world)
    right, tries = captured.record, []

    def record(backend: Any, run: Any, kept: Any, agreed: Any) -> Any:
        mine: list[bool] = []

        def later(here: bool) -> bool:
            mine.append(here)
            return bool(agreed(here and (world.rank > 0 or len(mine) > 2)))

        made = right(backend, run, kept, later)
        tries.append(len(mine))
        return made

    monkeypatch.setattr(captured, "record", record)
    with over_nccl(), on_device(), engine(config, world) as e:
        train(e, config, 1)
    assert tries and set(tries) == {3} and world.allgather(tries) == [tries] * world.size


@on(2, 3)
def test_graphs_are_given_up_before_communicators(world: Intracomm) -> None:
    """NCCL waits for them before it frees one."""
    with over_nccl(), on_device(), engine(small(world), world) as e:
        train(e, e.config, 1)
        (made,) = {graph for block in blocks(e)[:1] for graph in graphs_of(block)[:1]}
        lanes = list(made.lanes)
        assert lanes and all(made in lane.graphs for lane in lanes) and made.graph is not None
        destroy, given_up = lanes[0].nccl.destroy, []
        lanes[0].nccl.destroy = lambda: (given_up.append(made.graph is None), destroy())
    assert given_up == [True]


def blocks(e: Any) -> list[Captured]:
    return [layer for stage in e.stages for layer in stage.layers.values() if isinstance(layer, Captured)]


def graphs_of(block: Captured) -> list[Any]:
    slots = [slot for free in block.free.values() for slot in free]
    return [recording.graph for slot in slots for recording in slot.recordings.values()]


@on(2, 3)
def test_mpi_is_refused(world: Intracomm) -> None:
    config = with_graphs(spread(tiny(), f"tp={world.size}"))
    with on_device(), pytest.raises(InputError, match="here over MPI, which no graph can hold; NCCL would fit"):
        with engine(config, world):
            pass


@on(2, 3)
def test_operations_that_nobody_waits_for_are_found(world: Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the stand-in, as CUDA finds them."""
    right = Done.Wait
    with over_nccl(), on_device() as device, engine(small(world), world) as e:
        monkeypatch.setattr(Done, "Wait", lambda self: right(self) if device.work is None else None)
        with pytest.raises(AssertionError, match="a capture ends before its streams have come together"):
            train(e, e.config, 1)


@on(2, 3)
@pytest.mark.parametrize("planted", [False, True])
def test_a_graph_runs_after_what_its_lanes_have_begun(
    world: Intracomm, planted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with over_nccl(), on_device() as device, engine(small(world), world) as e:
        e.gradient(0, *source_of(e.config)(0, e.share))
        x, block, ran = np.zeros((*next(iter(blocks(e)[0].free))[0],), np.float32), blocks(e)[0], device.graphs
        if planted:
            monkeypatch.setattr(Lane, "settle", lambda self: None)
        pending = e.parallel.tp.all_reduce(np.zeros(3))
        with pytest.raises(AssertionError, match="beside what the lane has begun") if planted else nullcontext():
            block.forward(x)
        pending.wait()
        assert device.graphs == ran + 1


def test_graphs_of_one_rank_need_no_agreement() -> None:
    with on_device():
        assert Graphs(None).agreed(True) and not Graphs(None).agreed(False)  # type: ignore[arg-type]
