"""The learning rate at the corners of its schedule."""

from __future__ import annotations

import math

import pytest

from hpcmp.optim.rate import warmup_cosine


def rate(step: int, *, peak: float = 2.0, warmup: int = 4, total: int = 14, final: float = 0.1) -> float:
    return warmup_cosine(step, peak=peak, warmup=warmup, total=total, final=final)


def test_warmup_is_linear_and_never_zero() -> None:
    assert [rate(step) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]


def test_cosine() -> None:
    assert rate(4) == 2.0  # the peak lasts two steps: the end of the warmup, the start of the cosine
    assert rate(9) == pytest.approx(2.0 * (0.1 + 0.9 / 2))  # half way down
    assert rate(6) == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 5)) / 2))
    assert rate(13) > rate(14)


def test_end_and_after() -> None:
    assert [rate(step) for step in (14, 15, 10**9)] == [pytest.approx(0.2)] * 3
    assert rate(14, final=0.0) == pytest.approx(0.0, abs=1e-15)
    assert [rate(step, final=1.0) for step in (4, 9, 14, 20)] == [2.0] * 4


def test_no_warmup() -> None:
    assert rate(0, warmup=0) == 2.0
    assert rate(7, warmup=0) == pytest.approx(2.0 * (0.1 + 0.9 / 2))


def test_warmup_to_the_end() -> None:
    assert rate(13, warmup=14) == 2.0
    assert rate(14, warmup=14) == 2.0
    assert rate(15, warmup=14) == pytest.approx(0.2)


def test_one_step() -> None:
    assert rate(0, warmup=0, total=1) == 2.0
    assert rate(1, warmup=0, total=1) == pytest.approx(0.2)


def test_rises_then_falls() -> None:
    rates = [rate(step, warmup=20, total=200) for step in range(250)]
    assert max(rates) == 2.0
    assert all(a < b for a, b in zip(rates[:20], rates[1:20], strict=False))
    assert all(a >= b for a, b in zip(rates[20:], rates[21:], strict=False))
    assert min(rates[20:]) == pytest.approx(0.2)
