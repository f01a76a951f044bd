"""Every layout gives the serial model's numbers; and what ``verify`` does when one does not, or cannot run."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpcmp.errors import InputError
from hpcmp.module import Module, Parameter
from hpcmp.parallel.buckets import Buckets
from hpcmp.training import verify as module
from hpcmp.training.config import Config
from hpcmp.training.engine import Engine
from hpcmp.training.layout import short
from hpcmp.training.verify import Difference, Report, resolve, source_of, verify
from tests.layouts import ODD, assert_serial, engine, layouts, small, spread

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

LIMIT = 1e-12  # of float64's 2e-16; measured: a few 1e-15

#: Sizes that no number of ranks divides.
CASES: dict[str, dict[str, Any]] = {
    "gpt": ODD | {"style": "gpt", "microbatch": 3},
    "llama": ODD | {"style": "llama", "tied": False, "bias": True, "layers": 3, "microbatch": 2},
    "gpt-untied": ODD
    | {"style": "gpt", "tied": False, "bias": False, "layers": 1, "batch": 3, "heads": 7, "kv_heads": 7},
}

#: Fewer of everything than ranks: heads, vocabulary rows, columns, positions, layers and samples.
FEW = {"layers": 1, "heads": 2, "kv_heads": 1, "vocabulary": 3, "ffn": 3, "sequence": 3, "batch": 3, "dropout": 0.1}


def some(configs: list[Config], world: Intracomm, turn: int, of: int) -> list[Config]:
    """All of ``configs`` on up to 4 ranks; on more, where there are many, the turn of one of ``of`` cases."""
    return configs if world.size <= 4 else configs[turn::of]


@pytest.mark.mpi
@pytest.mark.timeout(180)
@pytest.mark.parametrize("case", CASES)
def test_every_layout_of_odd_sizes(world: Intracomm, case: str) -> None:
    """dp x pp x tp in every way, with and without sequence parallelism, with dropout, microbatches and clipping."""
    assert_serial(some(layouts(small(**CASES[case]), world.size), world, list(CASES).index(case), len(CASES)), world)


@pytest.mark.mpi
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("turn", "style"), [(0, "gpt"), (1, "llama")])
def test_every_layout_and_schedule_with_fewer_of_everything_than_ranks(world: Intracomm, turn: int, style: str) -> None:
    config = small(**FEW, style=style, tied=True, microbatch=1)
    assert_serial(some(layouts(config, world.size, schedules=True), world, turn, 2), world)


@pytest.mark.mpi
def test_microbatches_of_any_size(world: Intracomm) -> None:
    for text in (f"pp={world.size}", f"dp={world.size}"):
        config = small(batch=5, dropout=0.1)
        assert_serial([spread(config, f"{text},micro={micro}") for micro in (1, 2, 4)], world)


@pytest.mark.mpi
@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_shorter_sequences_and_targets_that_are_ignored(world: Intracomm, style: str) -> None:
    """Of other lengths in every step, one position at last, and every third target ignored."""

    def source(step: int, share: slice) -> Any:
        inputs, targets, samples = source_of(config)(step, share)
        there = np.arange(5)[:, None] + samples
        return inputs[: 4 - step], np.where(there % 3, targets, -1)[: 4 - step], samples

    config = small(style=style, dropout=0.1, microbatch=2)
    for report in verify(layouts(config, world.size), world, source, steps=4):
        assert report.worst <= LIMIT, report.layout


@pytest.mark.mpi
def test_idle_ranks(world: Intracomm) -> None:
    """A layout runs on the first ranks; the others wait, and get the same report."""
    configs = [config for n in range(1, min(world.size, 3) + 1) for config in layouts(small(), n)]
    reports = verify(configs, world, source_of(small()))
    assert [report.ranks for report in reports] == [config.layout.ranks for config in configs]
    assert max(report.worst for report in reports) <= LIMIT
    assert world.allgather(reports) == [reports] * world.size


def test_serial_without_mpi() -> None:
    config = small(microbatch=2, recompute="full")
    (report,) = verify([config], None, source_of(config))
    assert report.worst <= LIMIT and report.layout == "dp=1,pp=1,tp=1,recompute=full" and report.ranks == 1
    with engine(config) as e:
        assert [(p.name, p.shape) for p in report.parameters] == [(p.name, p.shape) for p in e.buckets.parameters]


@pytest.mark.mpi
def test_too_few_ranks(world: Intracomm) -> None:
    need = 2 * (world.size + 1)
    config = small(tp=2, pp=world.size + 1)
    with pytest.raises(InputError, match=rf"needs {need} ranks, and there are {world.size}\b.*mpirun -n {need}\b"):
        verify([small(), config], world, source_of(config))


def test_too_few_ranks_without_mpi() -> None:
    with pytest.raises(InputError, match="layout dp=3,pp=1,tp=1 needs 3 ranks, and there are 1"):
        verify([small(dp=3)], None, source_of(small()))


class Wrong:
    """``Engine`` whose layout run (not the serial one, which has no microbatches) differs in one number."""

    def __init__(self, kind: str, name: str, by: float) -> None:
        self.kind, self.name, self.by = kind, name, by

    def __call__(self, config: Config, mesh: Any) -> Engine:
        made = Engine(config, mesh)
        if config.train.microbatch is None:
            return made
        step = made.step

        def wrong(number: int, *batch: Any) -> Any:
            result = step(number, *batch)
            if number == 1 and self.kind in ("gradient", "weight"):
                p = next(p for p in made.buckets.parameters if p.name == self.name)
                (p.grad if self.kind == "gradient" else p.data).flat[-1] += self.by
            elif number == 1:
                result = dataclasses.replace(result, **{self.kind: getattr(result, self.kind) + self.by})
            return result

        made.step = wrong  # type: ignore[method-assign, assignment]
        return made


@pytest.mark.parametrize("kind", ["loss", "norm", "gradient", "weight"])
@pytest.mark.parametrize("by", [1e-6, math.nan, math.inf])
def test_one_wrong_number_shows_where_it_is(kind: str, by: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last element, in the second step: that parameter and that kind are reported, nothing else."""
    name = "blocks/1/mlp/up/weight"
    monkeypatch.setattr(module, "Engine", Wrong(kind, name, by))
    config = small(microbatch=2)
    (report,) = verify([config], None, source_of(config))
    assert report.worst == math.inf if not math.isfinite(by) else 1e-7 < report.worst < 1e-2
    seen = {("loss", ""): report.loss, ("norm", ""): report.norm}
    seen |= {(kind, p.name): getattr(p, kind) for p in report.parameters for kind in ("gradient", "weight")}
    wrong = [key for key, value in seen.items() if not value <= LIMIT]
    assert wrong == [(kind, name if kind in ("gradient", "weight") else "")]


def test_worst_is_infinite_for_what_is_no_number() -> None:
    assert Report("", 1).worst == 0
    assert Report("", 1, [Difference("a", (1,), 1e-3, 2e-3)], 1e-4, 1e-5).worst == 2e-3
    assert Report("", 1, [Difference("a", (1,), math.nan, 0.0)]).worst == math.inf
    assert Report("", 1, loss=math.nan).worst == Report("", 1, norm=-math.inf).worst == math.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: setattr(p, "owned", tuple(slice(0, 0) for _ in p.shape)), "a is owned 0 to 0 times, not once"),
        (lambda p: setattr(p, "owned", (slice(0, 1), slice(0, 3))), "a is owned 0 to 1 times, not once"),
        (lambda p: setattr(p, "name", "b"), "b is no parameter of the serial model"),
    ],
)
def test_parameters_that_do_not_cover_the_model_are_an_error(change: Any, message: str) -> None:
    layer = Module()
    layer.p = p = Parameter((2, 3), name="a")  # type: ignore[attr-defined]
    change(p)
    with engine(small()) as e:
        e.buckets = Buckets(layer, e.mesh)
        with pytest.raises(RuntimeError, match=message):
            module._check_cover(e.mesh, e, {"a": (2, 3)})


def test_resolve() -> None:
    config = resolve(Config())
    assert config.train.dtype == "float64"
    assert config.layout.dp == 1
    assert config.model.vocabulary == 257
    assert config.optimizer.warmup is not None


def test_source_is_the_same_for_every_share_and_differs_between_steps_and_seeds() -> None:
    config = small(vocabulary=1003)
    inputs, targets, samples = source_of(config)(3, slice(0, 6))
    assert inputs.shape == targets.shape == (5, 6)
    np.testing.assert_array_equal(inputs[1:], targets[:-1])
    assert 0 <= inputs.min() and 500 < inputs.max() < 1003
    part = source_of(config)(3, slice(2, 5))
    for whole, some in zip((inputs, targets, samples), part, strict=True):
        np.testing.assert_array_equal(whole[..., 2:5], some)
    assert (source_of(config)(4, slice(0, 6))[0] != inputs).any()
    assert (source_of(small(vocabulary=1003, seed=1))(3, slice(0, 6))[0] != inputs).any()


def test_short() -> None:
    def text(layout: str) -> str:
        return short(spread(small(), layout).layout)

    assert text("tp=2,sp=1") == "dp=1,pp=1,tp=2,sp=1"
    assert text("dp=3,pp=2,schedule=zb-h1,recompute=full") == "dp=3,pp=2,tp=1,schedule=zb-h1,recompute=full"
