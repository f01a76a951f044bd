"""Every schedule is complete and free of deadlock and costs what its paper says; a wrong one is refused."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest

from hpcmp.errors import InputError
from hpcmp.parallel import schedules
from hpcmp.parallel.schedules import SCHEDULES, Action, Schedule, make_schedule

simulate = functools.cache(schedules.simulate)

GRID = [(p, m) for p in range(1, 9) for m in range(1, 13)]
LARGE = [(1, 200), (2, 64), (8, 40), (16, 16), (16, 64), (32, 7)]

#: Every schedule, the interleaved one with several numbers of chunks.
ALL: dict[str, Schedule] = {name: make(1) for name, make in SCHEDULES.items()}
ALL |= {f"interleaved-{v}": make_schedule("interleaved", v) for v in (2, 3, 5)}
SPLIT = {"zb-h1", "zb-v", "dualpipe-v"}
GPIPE, ONE_F_ONE_B, ZB_H1 = ALL["gpipe"], ALL["1f1b"], ALL["zb-h1"]
ZB_V, DUALPIPE_V = ALL["zb-v"], ALL["dualpipe-v"]


def idle(schedule: Schedule, p: int, m: int, costs: tuple[float, float, float] = (1, 1, 1)) -> float:
    """How long the busiest rank idles, which with equal costs any rank does."""
    return simulate(schedule, p, m, costs).time - m * schedule.chunks * sum(costs)


@pytest.mark.parametrize("name", ALL)
def test_complete_and_free_of_deadlock(name: str) -> None:
    for p, m in GRID + LARGE:
        schedule = ALL[name]
        found = simulate(schedule, p, m)
        kinds = "FBW" if name in SPLIT else "FB"
        wanted = {
            (r, Action(k, i, c))  # type: ignore[arg-type]
            for r in range(p)
            for k in kinds
            for i in range(m)
            for c in range(schedule.chunks)
        }
        assert set(found.starts) == set(found.ends) == wanted


@pytest.mark.parametrize("name", ALL)
def test_no_microbatches_is_nothing_to_do(name: str) -> None:
    assert [list(ALL[name](rank, 3, 0)) for rank in range(3)] == [[], [], []]
    assert simulate(ALL[name], 3, 0).time == 0


@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
@pytest.mark.parametrize("placement", ["loop", "v"])
def test_every_virtual_stage_is_held_once(chunks: int, placement: Any) -> None:
    schedule = Schedule("test", lambda *_: [], chunks, placement)
    for p in range(1, 6):
        places = [(schedule.stage(r, p, c), (r, c)) for r in range(p) for c in range(chunks)]
        assert sorted(stage for stage, _ in places) == list(range(schedule.stages(p)))
        assert all(schedule.holder(stage, p) == place for stage, place in places)


def test_placements_by_hand() -> None:
    assert [make_schedule("interleaved", 2).holder(stage, 3) for stage in range(6)] == [
        *((0, 0), (1, 0), (2, 0)),
        *((0, 1), (1, 1), (2, 1)),
    ]
    assert [ZB_V.holder(stage, 3) for stage in range(6)] == [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1)]
    assert ZB_V.cause(2, 3, Action("F", 5, 1)) == (2, Action("F", 5, 0))
    assert ZB_V.effect(0, 3, Action("B", 5, 1)) == (1, Action("B", 5, 1))
    assert ZB_V.cause(0, 3, Action("B", 5, 1)) is ZB_V.effect(0, 3, Action("B", 5, 0)) is None
    assert make_schedule("interleaved", 2).cause(0, 3, Action("F", 5, 1)) == (2, Action("F", 5, 0))


@pytest.mark.parametrize("schedule", [GPIPE, ONE_F_ONE_B], ids=lambda schedule: schedule.name)
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
        idles, of_1f1b = idle(ZB_H1, p, m), idle(ONE_F_ONE_B, p, m)
        assert idles == p - 1 + max(0, p - m)
        assert (3 * idles == of_1f1b) == (m >= p or p == 1)
        assert simulate(ZB_H1, p, m).bubble == pytest.approx(idles / (3 * m + idles), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("v", [2, 3, 5])
@pytest.mark.parametrize("costs", [(1, 1, 1), (2, 3, 1)])
def test_bubble_of_interleaved(v: int, costs: tuple[float, float, float]) -> None:
    """(p-1)/(v m + p-1) where p divides m: a v-th of 1F1B's idle time. Elsewhere more, and at most 1F1B's."""
    schedule = make_schedule("interleaved", v)
    for p, m in GRID + LARGE:
        found = simulate(schedule, p, m, costs)
        if m % p == 0:
            assert found.bubble == pytest.approx((p - 1) / (v * m + p - 1), rel=1e-12, abs=1e-15)
        assert (p - 1) * sum(costs) <= idle(schedule, p, m, costs) <= v * (p - 1) * sum(costs)


def test_bubble_of_zero_bubble_v() -> None:
    """In units of a chunk's F = B = W a sixth of 1F1B's idle time, p - 1: rank r waits r in the beginning, and none
    waits again. From 2 p - 1 microbatches on; with fewer 2 (p - 1) more for each that is missing, at most."""
    for p, m in GRID + LARGE:
        idles, missing = idle(ZB_V, p, m), max(0, 2 * p - 1 - m)
        assert p - 1 <= idles <= p - 1 + 2 * missing
        assert idles <= 2 * idle(ZB_H1, p, m)
        if not missing:
            assert idles == p - 1 and 6 * idles == idle(ONE_F_ONE_B, p, m, (2, 2, 2))
            found = simulate(ZB_V, p, m)
            for rank in range(p):
                mine = [action for r, action in found.starts if r == rank]
                assert found.starts[rank, mine[0]] == rank and found.ends[rank, mine[-1]] == rank + 6 * m


def test_bubble_of_dualpipe_v() -> None:
    """The same idle time as ZB-V's, from 2 p microbatches on."""
    for p, m in GRID + LARGE:
        idles = idle(DUALPIPE_V, p, m)
        assert (idles == p - 1) if m >= 2 * p else (p - 1 <= idles <= 4 * (p - 1))


@pytest.mark.parametrize("costs", [(4, 4, 4), (4, 5, 4), (4, 4, 3), (3, 4, 2)])
def test_bubble_of_zero_bubble_h1_for_other_costs(costs: tuple[float, float, float]) -> None:
    """(p - 1) (F + B - W): Qi et al., table 1, for W no longer than F and B, and enough microbatches."""
    f, b, w = costs
    for p in range(1, 9):
        for m in (2 * p, 3 * p, 40):
            assert simulate(ZB_H1, p, m, costs).time == m * sum(costs) + (p - 1) * (f + b - w)


def test_peak_activations() -> None:
    for p, m in GRID + LARGE:
        assert simulate(GPIPE, p, m).peak == [m] * p
        assert simulate(ONE_F_ONE_B, p, m).peak == [min(p - rank, m) for rank in range(p)]
        # never more than 1F1B has on its first rank, which has the most
        assert simulate(ZB_H1, p, m).peak == [min(p, m)] * p
        # the same in halves of a rank's blocks, and one half more
        assert within(simulate(ZB_V, p, m).peak, 2 * p, exactly=m >= 2 * p - 1)
        assert within(simulate(DUALPIPE_V, p, m).peak, 2 * p + 1, exactly=m >= 2 * p)


def within(peak: list[int], most: int, exactly: bool) -> bool:
    return set(peak) == {most} if exactly else max(peak) <= most


@pytest.mark.parametrize("v", [2, 3, 5])
def test_peak_activations_of_interleaved(v: int) -> None:
    """Narayanan et al.: those of 1F1B, times 1 + (p-1)/(p v), on the first rank."""
    for p, m in GRID + LARGE:
        peak = simulate(make_schedule("interleaved", v), p, m).peak
        most = [2 * (p - 1 - rank) + (v - 1) * p + 1 for rank in range(p)]
        assert all(found <= bound for found, bound in zip(peak, most, strict=True))
        if m % p == 0 and m > p:
            assert peak == most


def test_costs_of_each_virtual_stage() -> None:
    """The slowest stage sets the pace: m times its costs, and the others' once."""
    assert simulate(GPIPE, 3, 10, ((1, 1, 1), (2, 2, 2), (1, 1, 1))).time == 6 * 10 + 3 + 3
    assert simulate(ZB_V, 1, 4, ((1, 0, 0), (0, 0, 2))).time == 12
    with pytest.raises(ValueError, match="costs of 2 virtual stages, and there are 3"):
        simulate(GPIPE, 3, 10, ((1, 1, 1), (2, 2, 2)))


def test_messages_take_time() -> None:
    """F and B of one microbatch on p ranks: 2 (p - 1) messages on the way."""
    for p in range(1, 5):
        assert simulate(ONE_F_ONE_B, p, 1, (1, 1, 1), send=0.25).time == 3 * p + 2 * (p - 1) * 0.25


@pytest.mark.parametrize("name", ALL)
def test_starts_follow_their_causes(name: str) -> None:
    schedule = ALL[name]
    for p, m in [(4, 6), (3, 2), (1, 3)]:
        found = simulate(schedule, p, m, (1, 1, 1), send=0.5)
        causes = 0
        for (rank, action), start in found.starts.items():
            cause = schedule.cause(rank, p, action)
            if cause:
                causes += 1
                assert schedule.effect(*(cause[0], p, cause[1])) == (rank, action)
                assert start >= found.ends[cause] + (0.5 if cause[0] != rank else 0)
        assert causes == 2 * m * (schedule.stages(p) - 1)


def test_1f1b_by_hand() -> None:
    def text(rank: int) -> str:
        return " ".join(str(action) for action in ONE_F_ONE_B(rank, 3, 4))

    assert text(0) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert text(1) == "F0 F1 B0 F2 B1 F3 B2 B3"
    assert text(2) == "F0 B0 F1 B1 F2 B2 F3 B3"


def test_zero_bubble_h1_by_hand() -> None:
    def text(rank: int) -> str:
        return " ".join(str(action) for action in ZB_H1(rank, 3, 4))

    assert text(0) == "F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3"
    assert text(2) == "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3"


def test_interleaved_by_hand() -> None:
    """Narayanan et al., figure 4, on two ranks: groups of two microbatches."""
    schedule = make_schedule("interleaved", 2)
    assert " ".join(map(str, schedule(0, 2, 4))) == ("F0 F1 F0.1 F1.1 F2 B0.1 F3 B1.1 F2.1 B0 F3.1 B1 B2.1 B3.1 B2 B3")
    assert " ".join(map(str, schedule(1, 2, 3))) == "F0 F1 F0.1 B0.1 F1.1 B1.1 F2 B0 B1 F2.1 B2.1 B2"


def test_zero_bubble_v_by_hand() -> None:
    assert " ".join(map(str, ZB_V(0, 2, 3))) == (
        "F0 F1 F2 F0.1 B0.1 W0.1 F1.1 B1.1 W1.1 B0 W0 F2.1 B2.1 W2.1 B1 W1 B2 W2"
    )
    assert " ".join(map(str, ZB_V(1, 2, 3))) == (
        "F0 F0.1 F1 F1.1 B0.1 W0.1 F2 B0 W0 F2.1 B1.1 W1.1 B1 B2.1 B2 W1 W2.1 W2"
    )


Change = Callable[[int, list[Action]], list[Action]]


def action(word: str) -> Action:
    """The inverse of ``str``."""
    microbatch, _, chunk = word[1:].partition(".")
    return Action(word[0], int(microbatch), int(chunk or 0))  # type: ignore[arg-type]


def swap(one: str, two: str, rank: int = 0) -> Change:
    """Exchange two actions of one rank."""
    other = {action(one): action(two), action(two): action(one)}
    return lambda here, actions: [other.get(a, a) for a in actions] if here == rank else actions


def without(word: str, rank: int) -> Change:
    return lambda here, actions: [a for a in actions if here != rank or a != action(word)]


def again(word: str, rank: int) -> Change:
    return lambda here, actions: [*actions, action(word)] if here == rank else actions


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("1f1b", swap("F0", "B0", rank=1), "rank 1 takes microbatch 0 out of order"),
        ("zb-h1", swap("B1", "W1"), "rank 0 takes microbatch 1 out of order"),
        ("1f1b", without("F2", 1), "rank 1 misses or repeats F2"),
        ("gpipe", without("B3", 0), "rank 0 misses or repeats B3"),
        ("zb-h1", without("W3", 2), "rank 2 misses or repeats W3"),
        ("1f1b", again("B1", 0), "rank 0 misses or repeats B1"),
        ("gpipe", again("F0", 2), "rank 2 misses or repeats F0"),
        ("zb-h1", again("W0", 1), "rank 1 misses or repeats W0"),
        ("gpipe", again("F4", 0), "rank 0 misses or repeats F4"),  # there is no microbatch 4
        ("1f1b", again("W0", 0), "misses or repeats"),  # one rank splits its backward, the others do not
        ("1f1b", swap("F1", "B0"), "1f1b: deadlock, the ranks wait at {0: 'B0', 1: 'F1', 2: 'F1'}"),
        ("zb-v", swap("B0.1", "W0.1"), "rank 0 takes microbatch 0 out of order in chunk 1"),
        ("zb-v", without("W2.1", 1), "rank 1 misses or repeats W2.1"),
        ("zb-v", again("F0.2", 1), "rank 1 misses or repeats F0.2"),  # there is no chunk 2
        ("zb-v", swap("F0", "F0.1", rank=2), "zb-v: deadlock, the ranks wait at {.*2: 'F0.1'}"),  # the turn of the V
        ("interleaved-2", swap("F0", "F0.1"), "interleaved: deadlock, the ranks wait at {0: 'F0.1'"),
    ],
)
def test_a_wrong_schedule_is_refused(name: str, change: Change, message: str) -> None:
    right = ALL[name]
    wrong = dataclasses.replace(right, order=lambda rank, p, m: change(rank, list(right(rank, p, m))))
    simulate(right, 3, 4)
    with pytest.raises(ValueError, match=message):
        simulate(wrong, 3, 4)


@pytest.mark.parametrize("name", ALL)
def test_forwards_alone(name: str) -> None:
    """Each once and without a deadlock, though they are no training step."""
    schedule = ALL[name].forward_only()
    with pytest.raises(ValueError, match="misses"):
        simulate(schedule, 2, 3)
    for p, m in GRID:
        both = dataclasses.replace(
            schedule,
            order=lambda rank, p, m, order=schedule.order: [
                *order(rank, p, m),
                *(a._replace(kind="B") for a in reversed(list(order(rank, p, m)))),
            ],
        )
        simulate(both, p, m)
    assert list(GPIPE.forward_only()(1, 2, 3)) == [Action("F", 0), Action("F", 1), Action("F", 2)]


def test_names() -> None:
    assert make_schedule("interleaved", 3).chunks == 3
    assert make_schedule("zb-v").chunks == make_schedule("zb-v", 2).chunks == 2
    assert list(make_schedule("interleaved", 1)(0, 3, 5)) == list(ONE_F_ONE_B(0, 3, 5))
    for name, virtual, message in [
        (
            "1f1bb",
            1,
            "unknown schedule '1f1bb'; there are gpipe, 1f1b, interleaved, zb-h1, zb-v, dualpipe-v, file:",
        ),
        ("1f1b", 2, "schedule 1f1b has 1 virtual stage.* a rank, not 2; only interleaved"),
        ("zb-v", 3, "schedule zb-v has 2 virtual stage.* a rank, not 3"),
    ]:
        with pytest.raises(InputError, match=message):
            make_schedule(name, virtual)
