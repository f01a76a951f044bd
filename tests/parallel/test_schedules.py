"""Every schedule is complete and free of deadlock and costs what its paper says; a wrong one is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from hpcmp.parallel.schedules import (
    SCHEDULES,
    Action,
    Schedule,
    forward_only,
    gpipe,
    one_f_one_b,
    simulate,
    zero_bubble_h1,
)

GRID = [(p, m) for p in range(1, 9) for m in range(1, 13)]
LARGE = [(1, 200), (2, 64), (8, 100), (16, 16), (16, 64), (32, 7), (64, 128)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_complete_and_free_of_deadlock(name: str) -> None:
    for p, m in GRID + LARGE:
        found = simulate(SCHEDULES[name], p, m)
        kinds = "FBW" if name == "zb-h1" else "FB"
        assert set(found.starts) == {(r, Action(k, i)) for r in range(p) for k in kinds for i in range(m)}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_microbatches_is_nothing_to_do(name: str) -> None:
    assert [list(SCHEDULES[name](rank, 3, 0)) for rank in range(3)] == [[], [], []]
    assert simulate(SCHEDULES[name], 3, 0).time == 0


@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b])
@pytest.mark.parametrize("costs", [(1, 1, 1), (2, 3, 1)])
def test_bubble_of_gpipe_and_1f1b(schedule: Schedule, costs: tuple[float, float, float]) -> None:
    """p - 1 forwards and backwards are waited for, whatever m: a share (p-1)/(m+p-1) of the step."""
    for p, m in GRID + LARGE:
        found = simulate(schedule, p, m, costs)
        assert found.time == sum(costs) * (m + p - 1)
        assert found.bubble == pytest.approx((p - 1) / (m + p - 1), rel=1e-12, abs=1e-15)


def test_bubble_of_zero_bubble_h1() -> None:
    """With F = B = W = 1 the last rank idles p - 1, a third of 1F1B's 3 (p - 1), from m = p on.

    With fewer microbatches there are too few weight gradients to fill the rest, and p - m is idle besides.
    """
    for p, m in GRID + LARGE:
        found = simulate(zero_bubble_h1, p, m)
        idle, of_1f1b = found.time - 3 * m, simulate(one_f_one_b, p, m).time - 3 * m
        assert idle == p - 1 + max(0, p - m)
        assert (3 * idle == of_1f1b) == (m >= p or p == 1)
        assert found.bubble == pytest.approx(idle / (3 * m + idle), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("costs", [(4, 4, 4), (4, 5, 4), (4, 4, 3), (3, 4, 2)])
def test_bubble_of_zero_bubble_h1_for_other_costs(costs: tuple[float, float, float]) -> None:
    """(p - 1) (F + B - W): Qi et al., table 1, for W no longer than F and B, and enough microbatches."""
    f, b, w = costs
    for p in range(1, 9):
        for m in (2 * p, 3 * p, 40):
            assert simulate(zero_bubble_h1, p, m, costs).time == m * sum(costs) + (p - 1) * (f + b - w)


def test_peak_activations() -> None:
    for p, m in GRID + LARGE:
        assert simulate(gpipe, p, m).peak == [m] * p
        assert simulate(one_f_one_b, p, m).peak == [min(p - rank, m) for rank in range(p)]
        # never more than 1F1B has on its first rank, which has the most
        assert simulate(zero_bubble_h1, p, m).peak == [min(p, m)] * p


def test_messages_take_time() -> None:
    """F and B of one microbatch on p ranks: 2 (p - 1) messages on the way."""
    for p in range(1, 5):
        assert simulate(one_f_one_b, p, 1, (1, 1, 1), send=0.25).time == 3 * p + 2 * (p - 1) * 0.25


def test_starts_follow_their_causes() -> None:
    for name, schedule in SCHEDULES.items():
        for p, m in [(4, 6), (3, 2)]:
            starts = simulate(schedule, p, m, (1, 1, 1), send=0.5).starts
            backward = 1 if name == "zb-h1" else 2
            for i in range(m):
                for r in range(p - 1):
                    assert starts[r + 1, Action("F", i)] >= starts[r, Action("F", i)] + 1 + 0.5
                    assert starts[r, Action("B", i)] >= starts[r + 1, Action("B", i)] + backward + 0.5


def test_1f1b_by_hand() -> None:
    def text(rank: int) -> str:
        return " ".join(f"{kind}{i}" for kind, i in one_f_one_b(rank, 3, 4))

    assert text(0) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert text(1) == "F0 F1 B0 F2 B1 F3 B2 B3"
    assert text(2) == "F0 B0 F1 B1 F2 B2 F3 B3"


def test_zero_bubble_h1_by_hand() -> None:
    def text(rank: int) -> str:
        return " ".join(f"{kind}{i}" for kind, i in zero_bubble_h1(rank, 3, 4))

    assert text(0) == "F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3"
    assert text(2) == "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3"


Change = Callable[[int, list[Action]], list[Action]]


def swap(a: str, b: str, rank: int = 0) -> Change:
    """Exchange two actions of one rank."""
    first, second = Action(a[0], int(a[1:])), Action(b[0], int(b[1:]))  # type: ignore[arg-type]

    def change(here: int, actions: list[Action]) -> list[Action]:
        other = {first: second, second: first}
        return [other.get(action, action) for action in actions] if here == rank else actions

    return change


def without(word: str, rank: int) -> Change:
    gone = Action(word[0], int(word[1:]))  # type: ignore[arg-type]
    return lambda here, actions: [a for a in actions if here != rank or a != gone]


def again(word: str, rank: int) -> Change:
    more = Action(word[0], int(word[1:]))  # type: ignore[arg-type]
    return lambda here, actions: [*actions, more] if here == rank else actions


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("1f1b", swap("F0", "B0", rank=1), "rank 1 takes microbatch 0 out of order"),
        ("zb-h1", swap("B1", "W1"), "rank 0 takes microbatch 1 out of order"),
        ("1f1b", without("F2", 1), "rank 1 misses or repeats.*'F'.*microbatch=2"),
        ("gpipe", without("B3", 0), "rank 0 misses or repeats.*'B'.*microbatch=3"),
        ("zb-h1", without("W3", 2), "rank 2 misses or repeats.*'W'.*microbatch=3"),
        ("1f1b", again("B1", 0), "rank 0 misses or repeats.*'B'.*microbatch=1"),
        ("gpipe", again("F0", 2), "rank 2 misses or repeats.*'F'.*microbatch=0"),
        ("zb-h1", again("W0", 1), "rank 1 misses or repeats.*'W'.*microbatch=0"),
        ("gpipe", again("F4", 0), "rank 0 misses or repeats.*'F'.*microbatch=4"),  # there is no microbatch 4
        ("1f1b", again("W0", 0), "misses or repeats"),  # one rank splits its backward, the others do not
        ("1f1b", swap("F1", "B0"), "deadlock, the ranks wait at {0: .*'B', microbatch=0.*, 1: .*'F', microbatch=1"),
    ],
)
def test_a_wrong_schedule_is_refused(name: str, change: Change, message: str) -> None:
    def wrong(rank: int, size: int, microbatches: int) -> Iterator[Action]:
        yield from change(rank, list(SCHEDULES[name](rank, size, microbatches)))

    simulate(SCHEDULES[name], 3, 4)
    with pytest.raises(ValueError, match=message):
        simulate(wrong, 3, 4)


def test_forwards_alone_are_no_training_step() -> None:
    with pytest.raises(ValueError, match="misses"):
        simulate(forward_only, 2, 3)
    assert list(forward_only(1, 2, 3)) == [Action("F", 0), Action("F", 1), Action("F", 2)]
