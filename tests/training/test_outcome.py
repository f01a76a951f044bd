"""What comes of a step stays on the device: nothing of it is read before the result is asked for."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hpcmp import arrays
from hpcmp.layers.loss import VocabularyParallelCrossEntropy
from hpcmp.layers.moe.router import Router
from hpcmp.optim.lamb import LAMB
from hpcmp.training.verify import source_of
from tests.kernels.emulation.backend import needs_gxx
from tests.layouts import engine, small
from tests.models.test_cuda_model import on_cuda

pytestmark = [needs_gxx, pytest.mark.timeout(300)]


class Read(Exception):
    """The host has read a number of the device."""


class Device(np.ndarray):
    """An array whose numbers the host cannot see, and neither those of what is computed from it."""

    def __array_wrap__(self, x: Any, context: Any = None, return_scalar: bool = False) -> Any:
        return np.asarray(x).view(Device)

    def __getitem__(self, key: Any) -> Any:
        return np.asarray(super().__getitem__(key)).view(Device)

    def __setitem__(self, key: Any, value: Any) -> None:
        np.asarray(self)[key] = np.asarray(value)

    def _read(self, *_: Any) -> Any:
        raise Read

    def __iter__(self) -> Any:
        return (self[i] for i in range(self.shape[0]))

    __float__ = __int__ = __bool__ = __index__ = item = tolist = _read  # type: ignore[assignment]


def to_host(x: Any) -> Any:
    if isinstance(x, Device):
        raise Read
    return np.asarray(x)


def on_device(patch: pytest.MonkeyPatch, e: Any) -> None:
    """The loss, the routers' sums, the sums of a step, its factor and LAMB's norms are ``Device`` from now on."""
    for module in [m for name, m in sys.modules.items() if name.startswith("hpcmp.")]:
        if getattr(module, "to_host", None) is arrays.to_host:
            patch.setattr(module, "to_host", to_host)
    forward = VocabularyParallelCrossEntropy.forward

    def hidden(self: Any, x: Any) -> Any:
        loss, saved = forward(self, x)
        return np.asarray(loss).view(Device), saved

    patch.setattr(VocabularyParallelCrossEntropy, "forward", hidden)
    xp = SimpleNamespace(**{**vars(np), "zeros": lambda *a: np.zeros(*a).view(Device)})
    for each in (e, *e.optimizer.buckets.buckets):
        patch.setattr(each, "xp", xp)
    patch.setattr(e, "factor", e.factor.view(Device))
    patch.setattr(e.host.copies, "read", lambda x: lambda: np.array(x, subok=False))


STEPS: dict[str, dict[str, Any]] = {
    "adamw": {"clip": None},
    "sgd": {"name": "sgd"},
    "lamb": {"name": "lamb"},
    "muon": {"name": "muon", "dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
}


@pytest.mark.parametrize("case", STEPS)
def test_a_steady_step_is_begun_without_a_look_at_any_number(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(**STEPS[case])
    source, found = source_of(config), []
    for hide in (False, True):
        with on_cuda(), engine(config) as e, monkeypatch.context() as patch:
            if hide:
                on_device(patch, e)
            running = [e.begin(i, *source(i, e.share), tell=i == 1) for i in range(2)]
            results = [each.result() for each in running]
            found.append((results, [b.master.copy() for b in e.buckets.buckets]))
    assert found[0][0] == found[1][0]
    assert all(np.array_equal(x, y) for x, y in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("what", ["factor", "ratios"])
def test_an_optimizer_that_asks_is_noticed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, update, sqrt = small(name="lamb"), LAMB.update, np.sqrt
    with on_cuda(), engine(config) as e:
        on_device(monkeypatch, e)
        if what == "factor":
            monkeypatch.setattr(LAMB, "update", lambda self, rate, scale: update(self, rate, float(scale[0])))
        else:
            xp = e.optimizer.buckets.buckets[0].xp
            monkeypatch.setattr(xp, "sqrt", lambda x: [[float(n) for n in row] for row in sqrt(x)])
        with pytest.raises(Read):
            e.begin(0, *source_of(config)(0, e.share))


def test_a_routers_sums_are_left_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts of each expert's tokens are read; what is told of the routers is not."""
    config = small(experts=4, capacity=1.0)
    count = Router._count

    def hidden(self: Any, scores: Any, lse: Any, *rest: Any) -> None:
        count(self, scores.view(Device), lse.view(Device), *rest)

    found = []
    for hide in (False, True):
        with on_cuda(), engine(config) as e, monkeypatch.context() as patch:
            if hide:
                on_device(patch, e)
                patch.setattr(Router, "_count", hidden)
            found.append(e.step(0, *source_of(config)(0, e.share)))
    assert found[0] == found[1] and found[0].balance > 0 and found[0].dropped > 0
