"""Interleaved 1F1B: each rank holds several short stages, so that the pipeline fills sooner."""

from __future__ import annotations

from collections.abc import Iterator

from .actions import Action, Order, first
from .one_chunk import one_f_one_b


def interleaved(virtual: int) -> Order:
    """1F1B over ``virtual`` chunks a rank: microbatches go in groups of p through one chunk after the other.

    Narayanan et al., "Efficient large-scale language model training", 2021, section 2.2.2: bubble (p-1)/(v m + p-1)
    where p divides m. Keeps at most 2 (p-1-r) + (v-1) p + 1 chunks' activations on rank r. A last group of fewer than p
    microbatches is planned as a whole one, of which those that are not there are left out. One chunk is 1F1B.
    """

    def order(rank: int, size: int, microbatches: int) -> Iterator[Action]:
        total = -(-microbatches // size) * size * virtual

        def forward(k: int) -> Action:
            group, k = divmod(k, size * virtual)
            return Action("F", group * size + k % size, k // size)

        def backward(k: int) -> Action:
            _, i, chunk = forward(k)
            return Action("B", i, virtual - 1 - chunk)

        ahead = min(total, 2 * (size - 1 - rank) + (virtual - 1) * size)
        for k in range(ahead):
            yield forward(k)
        for k in range(total - ahead):
            yield forward(ahead + k)
            yield backward(k)
        for k in range(total - ahead, total):
            yield backward(k)

    if virtual == 1:
        return one_f_one_b
    return lambda rank, size, microbatches: first(order(rank, size, microbatches), microbatches)
