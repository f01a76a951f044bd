"""Which blocks a pipeline stage holds, so that no stage is slower than need be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate


def balance(costs: Sequence[float], stages: int, first: float = 0.0, last: float = 0.0) -> tuple[int, ...]:
    """How many consecutive blocks each stage gets, so that the largest cost of a stage is as small as can be.

    costs: of each block; first, last: what the first and the last stage have to do besides. A stage may get none. Of
    several answers the one with the least sum of squares of the stages' costs, so that the others are even too. Exact,
    by dynamic programming: O(stages blocks^2).
    """
    before = [0.0, *accumulate(costs)]

    def cost(stage: int, start: int, stop: int) -> float:
        return before[stop] - before[start] + first * (stage == 0) + last * (stage == stages - 1)

    slowest, _ = _least(len(costs), stages, cost, max)

    def square(stage: int, start: int, stop: int) -> float:
        mine = cost(stage, start, stop)
        return mine * mine if mine <= slowest else math.inf

    return _least(len(costs), stages, square, lambda a, b: a + b)[1]


def _least(
    blocks: int, stages: int, cost: Callable[[int, int, int], float], join: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """The least value of the joined costs of all stages, and the counts that have it.

    least[j] is that of the stages so far, with the first j blocks, and counts[j] how they share them.
    """
    least = [cost(0, 0, j) for j in range(blocks + 1)]
    counts: list[tuple[int, ...]] = [(j,) for j in range(blocks + 1)]
    for stage in range(1, stages):
        found = [
            min((join(least[i], cost(stage, i, j)), -i) for i in range(j + 1))  # of equal ones, that of fewer here
            for j in range(blocks + 1)
        ]
        counts = [(*counts[-i], j + i) for j, (_, i) in enumerate(found)]
        least = [value for value, _ in found]
    return least[blocks], counts[blocks]
