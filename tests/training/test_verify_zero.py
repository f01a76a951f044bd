"""ZeRO 1, 2 and 3, whole and hybrid, give the serial model's numbers with everything else that a layout has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.layouts import assert_serial, small, spread

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi

SMALL_BUCKETS = 2e-4  # MB: several a block


def every(world: Intracomm, text: str, stages: tuple[int, ...] = (1, 2, 3), **values: Any) -> None:
    """Compare ``text`` with each stage of ZeRO."""
    assert_serial([spread(small(**values), f"{text},zero={zero}", world.size) for zero in stages], world)


@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_replicas(world: Intracomm, style: str) -> None:
    """Shares of the batch that differ, several microbatches, dropout, clipping; the embedding tied to the head."""
    every(world, "tp=1,micro=1", style=style, tied=True, batch=7, dropout=0.1, bucket_mb=SMALL_BUCKETS)


@pytest.mark.mpi(min_size=4)
def test_hybrid(world: Intracomm) -> None:
    """Shards within groups of two ranks, copies among the groups."""
    for group in {2, world.size // 2}:
        every(world, f"tp=1,micro=2,zero_group={group}", dropout=0.1, bucket_mb=SMALL_BUCKETS)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("sp", [0, 1])
def test_tensor_parallel(world: Intracomm, sp: int) -> None:
    """Key-value heads that two ranks read overlap without being the same slab, on shards of any size."""
    if world.size % 2:
        every(world, f"tp={world.size},sp={sp}", style="llama", heads=4, kv_heads=2)
    else:
        every(world, f"tp=2,sp={sp},micro=2", style="llama", bucket_mb=SMALL_BUCKETS)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_pipeline(world: Intracomm, schedule: str) -> None:
    """The table tied across its ends; microbatches in flight; weight gradients that wait for their slot."""
    text = f"pp=2,schedule={schedule},micro=1,recompute=full" + (",tp=2" if world.size == 8 else "")
    every(world, text, tied=True, layers=3, bucket_mb=SMALL_BUCKETS)


@pytest.mark.mpi(min_size=4)
def test_virtual_stages(world: Intracomm) -> None:
    """Two chunks a rank, one window for both; the ends on one rank share a table in both with zbv."""
    for schedule in ("interleaved", "zb-v"):
        every(world, f"pp=2,schedule={schedule},virtual=2,micro=1", tied=True, layers=4)


@pytest.mark.mpi(min_size=4)
def test_axes_of_data(world: Intracomm) -> None:
    """Weights are sharded over context parallelism and the z of a grid as over replicas."""
    every(world, "cp=2,micro=2", sequence=9)
    every(world, "tp_z=2", stages=(3,))
    every(world, f"tp_z=2,zero_group={world.size}", stages=(3,))


@pytest.mark.mpi(min_size=4)
def test_experts(world: Intracomm) -> None:
    """Experts are sharded over the ranks that hold the same ones, the rest over all; whole and hybrid."""
    for group in (world.size, 2):
        every(world, f"ep=2,micro=1,zero_group={group}", experts=4, style="llama")


@pytest.mark.mpi(min_size=2)
def test_fewer_elements_than_ranks(world: Intracomm) -> None:
    """Some shards are empty."""
    few = {"layers": 1, "hidden": 2, "heads": 1, "kv_heads": 1, "head_size": 2, "ffn": 1, "vocabulary": 3}
    every(world, "tp=1", **few, sequence=2, batch=2, bucket_mb=1e-6)
