"""Batches: any layout's shares and microbatches are the columns of one global batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hpcmp.data import Batches, Sampler, Split, TokenFile
from hpcmp.errors import DataError
from hpcmp.partition import part

SEQUENCE, BATCH = 16, 12


def batches(file: TokenFile, share: slice | None = None, batch: int = BATCH, split: str = "train") -> Batches:
    chosen = file.split(split)
    return Batches(chosen, Sampler.over(chosen, SEQUENCE, seed=5), batch, share)


def assert_same_batch(pieces: list[NDArray[Any]], whole: NDArray[Any]) -> None:
    """The pieces, side by side, are the columns of the global batch."""
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)


def test_one_batch(long_file: TokenFile) -> None:
    split = long_file.split("train")
    b = batches(long_file)
    inputs, targets, indices = b.read(3)
    assert inputs.shape == targets.shape == (SEQUENCE, BATCH) and inputs.dtype == targets.dtype == np.int32
    assert inputs.flags.c_contiguous and np.shares_memory(inputs, targets)
    assert indices.tolist() == list(range(BATCH))
    for column, start in enumerate(b.sampler.batch(3, BATCH)):
        np.testing.assert_array_equal(inputs[:, column], split.read(start, SEQUENCE))
        np.testing.assert_array_equal(targets[:, column], split.read(start + 1, SEQUENCE))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8, 12, 16])
@pytest.mark.parametrize("microbatches", [1, 2, 3])
def test_every_layout_sees_the_same_global_batch(long_file: TokenFile, ranks: int, microbatches: int) -> None:
    for step in (0, 1, 400):  # 400 is in a later epoch
        whole = batches(long_file).read(step)
        shares = [batches(long_file, part(BATCH, ranks, r)).read(step) for r in range(ranks)]
        for name in ("inputs", "targets"):
            cut = [
                getattr(share, name)[:, part(len(share.indices), microbatches, m)]
                for share in shares
                for m in range(microbatches)
            ]
            assert_same_batch(cut, getattr(whole, name))
        assert np.concatenate([share.indices for share in shares]).tolist() == list(range(BATCH))


def test_the_comparison_finds_planted_errors(long_file: TokenFile) -> None:
    whole = batches(long_file).read(0).inputs
    right = [batches(long_file, part(BATCH, 3, r)).read(0).inputs for r in range(3)]
    assert_same_batch(right, whole)
    off_by_one = batches(long_file, slice(5, 9)).read(0).inputs
    next_step = batches(long_file, part(BATCH, 3, 1)).read(1).inputs
    for wrong in ([right[0], off_by_one, right[2]], [right[0], next_step, right[2]], right[::-1], right[:2]):
        with pytest.raises(AssertionError):
            assert_same_batch(wrong, whole)


@pytest.mark.mpi
def test_ranks_read_their_shares_of_one_batch(long_path: Path) -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    path = comm.bcast(str(long_path))
    with TokenFile(path) as file:
        mine = batches(file, part(BATCH, comm.size, comm.rank)).read(7)
        whole = batches(file).read(7)
    assert_same_batch(comm.allgather(mine.inputs), whole.inputs)
    assert_same_batch(comm.allgather(mine.targets), whole.targets)


def test_a_rank_reads_nothing_but_its_samples(long_file: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int]] = []
    read = Split.read

    def record(self: Split, start: int, count: int) -> NDArray[Any]:
        reads.append((start, count))
        return read(self, start, count)

    monkeypatch.setattr(Split, "read", record)
    b = batches(long_file, slice(4, 7))
    b.read(2)
    assert reads == [(start, SEQUENCE + 1) for start in b.sampler.batch(2, BATCH)[4:7]]


def test_an_empty_share(long_file: TokenFile) -> None:
    batch = batches(long_file, slice(12, 12)).read(0)
    assert batch.inputs.shape == batch.targets.shape == (SEQUENCE, 0) and len(batch.indices) == 0


def test_resume_goes_on_where_the_run_stopped(long_file: TokenFile) -> None:
    b = batches(long_file, slice(0, 6))
    straight = [b.next().inputs for _ in range(8)]
    first = batches(long_file, slice(0, 6))
    for _ in range(5):
        first.next()
    resumed = batches(long_file, slice(0, 6))
    resumed.sampler.load_state_dict(json.loads(json.dumps(first.sampler.state_dict())))
    for step in (5, 6, 7):
        np.testing.assert_array_equal(resumed.next().inputs, straight[step])
        np.testing.assert_array_equal(resumed.read(step).inputs, straight[step])
    assert resumed.sampler.samples == 8 * BATCH


def test_resume_with_another_batch_repeats_and_skips_no_sample(long_file: TokenFile) -> None:
    b = batches(long_file)
    b.next()
    larger = batches(long_file, batch=20)
    larger.sampler.load_state_dict(b.sampler.state_dict())
    both = batches(long_file, batch=32).read(0).inputs
    assert_same_batch([larger.next().inputs], both[:, 12:])


def test_held_out_batches(long_file: TokenFile) -> None:
    b = batches(long_file, split="valid", batch=4)
    windows = (len(b.split) - 1) // SEQUENCE
    given = list(b.held_out(3))
    assert [g.inputs.shape for g in given] == [(SEQUENCE, 4)] * 3
    starts = b.sampler.held_out(12)
    for column, start in enumerate(starts):
        np.testing.assert_array_equal(given[column // 4].inputs[:, column % 4], b.split.read(start, SEQUENCE))
    assert len(list(b.held_out(10**6))) == windows // 4
    halves = [list(batches(long_file, part(4, 2, r), 4, "valid").held_out(3)) for r in range(2)]
    for i in range(3):
        assert_same_batch([h[i].targets for h in halves], given[i].targets)
    assert b.sampler.samples == 0
    with pytest.raises(DataError, match=rf"long.h5: valid has {windows} windows .* batch of {windows + 1}"):
        next(batches(long_file, split="valid", batch=windows + 1).held_out(1))


@pytest.mark.parametrize(("batch", "share"), [(0, None), (4, slice(0, 4, 2))])
def test_nonsense_shares(long_file: TokenFile, batch: int, share: slice | None) -> None:
    with pytest.raises(ValueError, match="no batch"):
        batches(long_file, share, batch)
