"""Schedules of one stage a rank: GPipe, 1F1B, ZB-H1."""

from __future__ import annotations

from collections.abc import Iterator

from .actions import Action


def gpipe(rank: int, size: int, microbatches: int) -> Iterator[Action]:
    """All forwards, then all backwards. Huang et al., "GPipe", 2019. Keeps every microbatch's activations."""
    for i in range(microbatches):
        yield Action("F", i)
    for i in range(microbatches):
        yield Action("B", i)


def one_f_one_b(rank: int, size: int, microbatches: int) -> Iterator[Action]:
    """1F1B: as few forwards ahead as keep every stage fed, then one backward a forward.

    Narayanan et al., "PipeDream-Flush", 2021. Keeps at most size - rank microbatches; bubble (p-1)/(m+p-1).
    """
    ahead = min(size - 1 - rank, microbatches)
    for i in range(ahead):
        yield Action("F", i)
    for i in range(microbatches - ahead):
        yield Action("F", ahead + i)
        yield Action("B", i)
    for i in range(microbatches - ahead, microbatches):
        yield Action("B", i)


def zero_bubble_h1(rank: int, size: int, microbatches: int) -> Iterator[Action]:
    """ZB-H1: 1F1B whose weight gradients lag by ``rank`` microbatches, so that they fill the bubble.

    Qi et al., "Zero bubble pipeline parallelism", 2024, section 3.1: the memory of 1F1B, a third of its bubble.
    """
    done = 0
    for action in one_f_one_b(rank, size, microbatches):
        yield action
        if action.kind == "B" and action.microbatch >= rank:
            yield Action("W", done)
            done += 1
    for i in range(done, microbatches):
        yield Action("W", i)
