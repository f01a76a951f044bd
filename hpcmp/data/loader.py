"""Batches: this rank's share of the global batch, read from the token file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .sampler import Sampler
from .tokens import Split


class Batch(NamedTuple):
    """``targets`` are ``inputs`` one token later; both int32, (sequence, samples), rows of one array without a copy.

    ``indices``, int64 (samples,), are the places of these samples in the global batch, column by column.
    """

    inputs: NDArray[np.int32]
    targets: NDArray[np.int32]
    indices: NDArray[np.int64]


class Batches:
    """The batches of a split, as far as one rank needs them.

    Every step consumes ``batch`` samples over all ranks, in the sampler's order; this rank holds those at ``share`` of
    that global batch (a slice of ``range(batch)``, as ``hpcmp.partition.part`` gives it; all of them by default) and
    reads no others. Shares of all the data-parallel ranks together, and microbatches of a share, are the columns of the
    global batch in order, so every layout trains on the same samples.
    """

    def __init__(self, split: Split, sampler: Sampler, batch: int, share: slice | None = None) -> None:
        first, last, stride = (share or slice(0, batch)).indices(batch)
        if batch < 1 or stride != 1 or last < first:
            raise ValueError(f"no batch of {batch} samples with the share {share}")
        self.split = split
        self.sampler = sampler
        self.batch = batch
        self.indices = np.arange(first, last, dtype=np.int64)

    def read(self, step: int) -> Batch:
        """The batch of any step of a run whose steps all consume ``batch`` samples; changes nothing."""
        return self._read(self.sampler.starts(step * self.batch + self.indices))

    def next(self) -> Batch:
        """The batch after the samples consumed so far, ``sampler.samples``, which then count ``batch`` more."""
        batch = self._read(self.sampler.starts(self.sampler.samples + self.indices))
        self.sampler.samples += self.batch
        return batch

    def held_out(self, steps: int) -> Iterator[Batch]:
        """Up to ``steps`` whole batches of windows spread evenly over the split, the same at every call.

        Raises DataError if the split has too few windows for one.
        """
        windows = (self.sampler.tokens - 1) // self.sampler.sequence
        steps = min(steps, windows // self.batch)
        if not steps:
            raise DataError(
                f"{self.split.name} has {windows} windows of sequence length {self.sampler.sequence}, fewer than a "
                f"batch of {self.batch}: give more held-out text or a smaller batch"
            )
        for starts in self.sampler.held_out(steps * self.batch).reshape(steps, self.batch):
            yield self._read(starts[self.indices])

    def _read(self, starts: NDArray[np.int64]) -> Batch:
        rows = np.empty((self.sampler.sequence + 1, len(starts)), np.int32)
        for column, start in enumerate(starts.tolist()):
            rows[:, column] = self.split.read(start, len(rows))
        return Batch(rows[:-1], rows[1:], self.indices)
