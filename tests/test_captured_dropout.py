"""Captured blocks that drop: each step and microbatch has masks of its own, the bits of a run without graphs."""

from __future__ import annotations

from typing import Any

import pytest

from hpcmp import captured
from hpcmp.training.verify import source_of
from tests.kernels.emulation.backend import needs_gxx
from tests.test_captured import captured_engine, differences, tiny

pytestmark = [needs_gxx, pytest.mark.timeout(300)]  # g++ builds what has changed


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1"])
@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_dropout(style: str, schedule: str) -> None:
    """Masks of their own in each step and microbatch, of which several are in flight; none in evaluation."""
    dtype = "bfloat16" if style == "gpt" else "float32"
    assert not differences(tiny(style=style, dropout=0.3, schedule=schedule, microbatch=1, dtype=dtype))


@pytest.mark.parametrize("recompute", ["full", "attention", "activations"])
def test_recomputation_draws_the_same_masks(recompute: str) -> None:
    assert not differences(tiny(dropout=0.3, recompute=recompute, schedule="gpipe"))


def test_the_masks_of_a_microbatch_are_one_copy_to_the_device() -> None:
    config = tiny(dropout=0.3, layers=3)
    with captured_engine(config) as (e, _):
        source, arrays, made = source_of(config), e.cursor.arrays, []

        def told(place: Any, xp: Any) -> Any:
            before = place.arrays.get("drawn")
            found = arrays(place, xp)
            made.append(found["drawn"] is not before)
            return found

        e.cursor.arrays = told  # type: ignore[method-assign]
        e.step(0, *source(0, e.share))
        assert sum(made) == e.microbatches() < len(made)


def arrays_of_all(init: Any) -> Any:
    def planted(self: Any, block: Any, key: Any, *others: Any) -> None:
        init(self, block, key, *others)
        shared = block.__dict__.setdefault("planted", {}).setdefault(key, self.place.arrays)
        self.place.arrays.update(shared)

    return planted


def filled_once(forward: Any) -> Any:
    def planted(self: Any, x: Any, arrays: Any) -> Any:
        found = forward(self, x, {} if hasattr(self, "filled") else arrays)
        self.filled = True
        return found

    return planted


ERRORS = {
    "microbatches in flight share the keys of their masks": ("__init__", arrays_of_all, "gpipe"),
    "the keys of masks are not copied in again": ("forward", filled_once, "1f1b"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_planted_errors_are_found(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, made, schedule = ERRORS[error]
    monkeypatch.setattr(captured.Slot, name, made(getattr(captured.Slot, name)))
    assert differences(tiny(schedule=schedule, microbatch=1, dropout=0.3))
