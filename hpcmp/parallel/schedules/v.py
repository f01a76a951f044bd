"""Schedules of two stages a rank placed like a V: each rank holds one on the way up and one on the way down again.

The last virtual stage lies on rank 0, beside the first. A microbatch's backward begins where its forward began, so
that all ranks hold equally many activations, and weight gradients fill what would be waiting.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

from .actions import Action, Kind, first


class _Next:
    """The next action of a kind in a chunk: each goes through the microbatches in order."""

    def __init__(self) -> None:
        self.count: Counter[tuple[Kind, int]] = Counter()

    def __call__(self, *steps: tuple[Kind, int]) -> Iterator[Action]:
        for kind, chunk in steps:
            yield Action(kind, self.count[kind, chunk], chunk)
            self.count[kind, chunk] += 1


def zero_bubble_v(rank: int, size: int, microbatches: int) -> Iterator[Action]:
    """ZB-V. Qi et al., "Zero bubble pipeline parallelism", 2024, section 6: with F = B = W no rank waits between its
    first action and its last, in the memory of 1F1B.

    In units of a chunk's F: time 6 m + p - 1 (from 2 p - 1 microbatches on), and 2 p chunks' activations at most.
    """
    return first(_zero_bubble_v(rank, size, max(microbatches, 2 * size - 1)), microbatches)


def _zero_bubble_v(rank: int, size: int, microbatches: int) -> Iterator[Action]:
    act = _Next()
    for _ in range(2 * (size - rank) - 1):
        yield from act(("F", 0))
    for _ in range(rank):
        yield from act(("F", 1), ("F", 0))
    for _ in range(size - rank):
        yield from act(("F", 1), ("B", 1), ("W", 1))
    while act.count["F", 1] < microbatches:
        if act.count["F", 0] < microbatches:
            yield from act(("F", 0))
        yield from act(("B", 0), ("W", 0), ("F", 1), ("B", 1), ("W", 1))
    for _ in range(rank):
        yield from act(("B", 0), ("B", 1))
    for _ in range(size - rank):
        yield from act(("B", 0), ("W", 0))
    while act.count["W", 1] < microbatches:
        yield from act(("W", 1))
    while act.count["W", 0] < microbatches:
        yield from act(("W", 0))


def dual_pipe_v(rank: int, size: int, microbatches: int) -> Iterator[Action]:
    """DualPipe-V: DualPipe (DeepSeek-V3 technical report, 2024, section 3.2.1) cut in half, so that weights are not
    held twice. Forwards of one chunk stand beside backwards of the other, whose messages they may hide.

    In units of a chunk's F = B = W: time 6 m + p - 1 (from 2 p microbatches on), and 2 p + 1 chunks' activations.
    """
    return first(_dual_pipe_v(rank, size, max(microbatches, 2 * size)), microbatches)


def _dual_pipe_v(rank: int, size: int, microbatches: int) -> Iterator[Action]:
    act, later = _Next(), deque[tuple[Kind, int]]()
    both0: tuple[tuple[Kind, int], ...] = (("B", 0), ("W", 0))
    both1: tuple[tuple[Kind, int], ...] = (("B", 1), ("W", 1))
    for _ in range(2 * (size - rank - 1)):
        yield from act(("F", 0))
    for _ in range(rank + 1):
        yield from act(("F", 0), ("F", 1))
    for _ in range(size - rank - 1):
        yield from act(*both1, ("F", 1))
    for _ in range(microbatches - 2 * size + rank + 1):
        yield from act(("F", 0), *both1, ("F", 1), *both0)
    for _ in range(size - rank - 1):
        yield from act(*both1, ("F", 1), *both0)
    for k in range(2 * (rank + 1)):  # from the half on, weight gradients wait for the end
        chunk = 1 - k % 2
        yield from act(("B", chunk))
        if k > rank:
            later.append(("W", chunk))
        else:
            yield from act(("W", chunk))
    for _ in range(size - rank - 1):
        yield from act(later.popleft(), ("B", 0))
        later.append(("W", 0))
    yield from act(*later)
