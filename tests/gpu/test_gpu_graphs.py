"""CUDA graphs on a GPU: what lies where, and blocks that have the bits of blocks that are not captured."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp import kernels
from hpcmp.arrays import dtype_of, to_host
from hpcmp.captured import Captured
from hpcmp.errors import HpcmpError, InputError
from hpcmp.kernels.cuda import graphs, multiply
from hpcmp.training.config import Config
from hpcmp.training.verify import source_of
from tests.layouts import engine, small, spread

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.fixture
def backend() -> graphs.Cupy:
    if not multiply.adds_biases():
        pytest.skip("nvmath-python is not installed")
    return graphs.Cupy()


def test_work_is_replayed_on_the_current_stream(backend: graphs.Cupy) -> None:
    """On what lies in its arrays then; what it keeps has memory of its own, what it hands on has not."""
    import cupy

    x, total = cupy.zeros(1 << 16, np.float32), cupy.zeros(1 << 16, np.float32)

    def work() -> tuple[Any, Any]:
        between = x * 2
        kept = between + 1
        total[...] += kept
        return kept, backend.alias(kept * between)

    work()  # CuPy compiles what it launches
    total[...] = 0
    first, second = graphs.record(backend, work), graphs.record(backend, work)
    assert not to_host(total).any()  # nothing has been executed
    expected, sums = [], 0.0
    for i, made in enumerate([first, second, first, second]):
        backend.copy(x, cupy.full(1 << 16, i, np.float32))
        made.graph.launch()
        sums += 2 * i + 1
        assert to_host(made.result[1])[7] == (2 * i + 1) * 2 * i
        expected.append(2.0 * i + 1)
    for made, value in ((first, 5), (second, 7)):
        np.testing.assert_array_equal(to_host(made.result[0]), np.float32(value))
    np.testing.assert_array_equal(to_host(total), np.float32(sums))
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.get_current_stream().synchronize()
    with stream:
        backend.copy(x, cupy.full(1 << 16, 50, np.float32))
        first.graph.launch()
        np.testing.assert_array_equal(to_host(first.result[0]), np.float32(101))


def test_scratch_memory_is_that_of_all_graphs(backend: graphs.Cupy) -> None:
    import cupy

    x = cupy.zeros(1 << 20, np.float32)

    def work() -> Any:
        y = x
        for _ in range(5):
            y = y + 1
        return backend.alias(y)

    work()
    made = [graphs.record(backend, work) for _ in range(4)]
    assert backend.pool.used_bytes() == 0 < backend.pool.total_bytes() <= 3 * x.nbytes
    used = cupy.get_default_memory_pool().used_bytes()
    backend.pool.free_all_blocks()  # as it does when memory runs short
    assert cupy.get_default_memory_pool().used_bytes() == used
    for each in made:
        each.graph.launch()
        assert to_host(each.result)[0] == 5


def test_tables_that_launches_read_stay(backend: graphs.Cupy) -> None:
    import cupy

    x, angle = cupy.ones((64, 2, 4, 32), np.float32), cupy.arange(64 * 16, dtype=np.float32).reshape(64, 1, 1, 16)
    tables = [cupy.cos(angle), cupy.sin(angle)]
    wanted = to_host(kernels.of(x).rope(x.copy(), *tables))
    made = graphs.record(backend, lambda: kernels.of(x).rope(x.copy(), *tables))
    tables.clear()
    taken = [cupy.full((64, 1, 1, 16), np.nan, np.float32) for _ in range(8)]
    made.graph.launch()
    np.testing.assert_array_equal(to_host(made.result), wanted)
    assert len(made.seen) == 2 and len(taken) == 8


def test_what_the_host_asks_for_cannot_be_captured(backend: graphs.Cupy) -> None:
    """And the stream can capture again after that."""
    import cupy

    x = cupy.ones(8)
    with pytest.raises(HpcmpError, match=r"train\.cuda_graphs = true: not to be captured"):
        graphs.record(backend, lambda: cupy.asarray(np.arange(1000.0)))
    made = graphs.record(backend, lambda: x + 1)
    made.graph.launch()
    np.testing.assert_array_equal(to_host(made.result), 2)


def test_cublas_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiply, "planners", lambda: (multiply._cublas,))
    with pytest.raises(InputError, match="nvmath-python"):
        graphs.Cupy()


def train(config: Config, world: Intracomm | None = None, *, captured: bool) -> dict[str, Any]:
    """What three steps compute, and an evaluation after the first."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, cuda_graphs=captured))
    source, found = source_of(config), dict[str, Any]()
    with engine(config, world) as e:
        for step in range(3):
            result = e.step(step, *source(step, e.share))
            found[f"step {step}"] = np.array([result.loss, result.norm])
            if not step:
                found["evaluation"] = np.array(e.evaluate(*source(100, e.share), config.train.batch))
        found |= {f"gradient {p.name}": to_host(p.grad) for p in e.buckets.parameters}
        found |= {f"weight {p.name}": to_host(p.data) for p in e.buckets.parameters}
        made = [layer for stage in e.stages for layer in stage.layers.values() if isinstance(layer, Captured)]
        assert bool(made) == captured and all(free for block in made for free in block.free.values())
    return found


def same_bits(config: Config, world: Intracomm | None = None) -> None:
    wanted = train(config, world, captured=False)
    for name, x in train(config, world, captured=True).items():
        np.testing.assert_array_equal(x, wanted[name], name)


@pytest.mark.parametrize("layout", ["dp=1", "schedule=gpipe,recompute=attention", "schedule=zb-h1,recompute=full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_the_same_bits(backend: graphs.Cupy, style: str, dtype: str, layout: str) -> None:
    """Of odd sizes, and of heads that cuDNN takes; microbatches of two sizes."""
    same_bits(spread(small(style=style, dtype=dtype, device="cuda", batch=7), f"micro=2,{layout}"))
    heads: dict[str, Any] = {"hidden": 64, "heads": 4, "kv_heads": 2, "head_size": 16, "ffn": 128, "sequence": 128}
    same_bits(spread(small(style=style, dtype=dtype, device="cuda", **heads), f"micro=2,{layout}"))


@pytest.mark.parametrize("layout", ["dp=1", "schedule=gpipe,recompute=full"])
def test_masks_of_dropout(backend: graphs.Cupy, layout: str) -> None:
    """Of attention, by our kernels, and of residuals: others in each step and microbatch."""
    same_bits(spread(small(dtype="bfloat16", device="cuda", dropout=0.3), f"micro=2,{layout}"))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("layout", ["tp={},sp=1,micro=1", "tp={},sp=0,micro=2,schedule=zb-h1", "cp={0},ulysses={0}"])
def test_blocks_that_communicate(world: Intracomm, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By NCCL, which wants a GPU for each rank."""
    from hpcmp.comm.device import select_device

    monkeypatch.setenv("HPCMP_SHARE_GPU", "1")
    if not select_device(world.rank, world.allgather).nccl:
        pytest.skip("NCCL does not connect ranks that share a GPU")
    if not multiply.adds_biases():
        pytest.skip("nvmath-python is not installed")
    config = small(dtype="bfloat16", device="cuda", sequence=9, dropout=0.1, heads=world.size, kv_heads=world.size)
    same_bits(spread(config, layout.format(world.size)), world)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-v"])
def test_over_stages_and_replicas(world: Intracomm, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpcmp.comm.device import select_device

    monkeypatch.setenv("HPCMP_SHARE_GPU", "1")
    select_device(world.rank, world.allgather)  # before anything asks cuBLASLt, which is of one GPU
    if not multiply.adds_biases():
        pytest.skip("nvmath-python is not installed")
    config = small(dtype="bfloat16", device="cuda", layers=2 * world.size, bucket_mb=1e-3)
    same_bits(spread(config, f"pp={world.size},micro=1,schedule={schedule}"), world)
    same_bits(spread(config, f"dp={world.size},micro=2,zero=1"), world)


def test_an_alias_lies_where_the_array_does(backend: graphs.Cupy) -> None:
    """And does not keep its memory."""
    import cupy

    x = cupy.empty((3, 5), dtype_of("bfloat16"))
    y = backend.alias(x[1:])
    assert y.data.ptr == x.data.ptr + 10 and y.dtype == x.dtype and y.strides == x.strides and y.shape == (2, 5)
    used = cupy.get_default_memory_pool().used_bytes()
    del x
    assert cupy.get_default_memory_pool().used_bytes() < used
