"""The public checks themselves: what they accept, what they refuse, and the example of docs/adjoints.md."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest

from hpcmp.arrays import Array
from hpcmp.comm.base import Solo
from hpcmp.cursor import Cursor, Place
from hpcmp.layers.parallel import ModelParallel
from hpcmp.module import Module, Parameter, normal
from hpcmp.testing import complete, draw, equals_serial, gradcheck, inner, prepare, share
from hpcmp.wgrad import WGrad

DOCS = Path(__file__).parents[1] / "docs" / "adjoints.md"


def example() -> str:
    """The program of the page."""
    found = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(found) == 1
    return str(found[0])


class Tanh(Module):
    """y = tanh(x w), x (..., f), with a gradient that can be made wrong."""

    def __init__(self, parallel: ModelParallel | None = None, wrong: float = 0.0) -> None:
        self.weight = (parallel or ModelParallel()).sharded(7, axis=0, initial=normal(1))
        self.wrong = wrong

    def forward(self, x: Array) -> tuple[Array, Any]:
        y = np.tanh(x * self.weight.data)
        return y, (x, y)

    def backward(self, dy: Array, saved: Any, wgrad: WGrad) -> Array:
        x, y = saved
        dz = dy * (1 - y * y)
        wgrad(self.backward_weight, x, dz)
        dx: Array = dz * self.weight.data
        if dx.size:
            dx[(0,) * dx.ndim] += self.wrong
        return dx

    def backward_weight(self, x: Array, dz: Array) -> None:
        self.weight.grad += (x * dz).sum(tuple(range(x.ndim - 1)))


X = np.random.default_rng(0).normal(size=(5, 2, 7))


def test_gradcheck_reports_small_errors_of_a_right_gradient() -> None:
    errors = gradcheck(Tanh(), X)
    assert set(errors) == {"input", "weight"}
    assert all(error < 1e-8 for error in errors.values())


@pytest.mark.parametrize("shape", [(5, 2, 7), (2, 7)])
def test_gradcheck_finds_one_wrong_number(shape: tuple[int, ...]) -> None:
    """Among many along random directions, among few by unit vectors."""
    with pytest.raises(AssertionError, match="Tanh: backward differs from central differences: input: .*at most 1e-06"):
        gradcheck(Tanh(wrong=1e-3), np.ones(shape))


def test_gradcheck_refuses_single_precision_parameters() -> None:
    module = Tanh()
    module.initialise(0, np.float32)
    with pytest.raises(TypeError, match="weight is float32"):
        gradcheck(module, X)


def test_gradcheck_refuses_a_gradient_of_the_wrong_shape() -> None:
    class Cut(Tanh):
        def backward(self, dy: Array, saved: Any, wgrad: WGrad) -> Array:
            return super().backward(dy, saved, wgrad)[..., :1]

    with pytest.raises(AssertionError, match=r"dx has shapes \[\(5, 2, 1\)\] for inputs of \[\(5, 2, 7\)\]"):
        gradcheck(Cut(), X)


def test_gradcheck_leaves_the_callers_arrays_alone() -> None:
    x = X.copy()
    gradcheck(Tanh(), x)
    np.testing.assert_array_equal(x, X)


def test_not_a_number_is_an_error() -> None:
    with pytest.raises(AssertionError), np.errstate(invalid="ignore"):
        gradcheck(Tanh(wrong=np.nan), X)
    with pytest.raises(AssertionError, match="input: nan"):
        equals_serial(lambda p: Tanh(p, np.nan), ModelParallel(), X, cut_x=share(2), cut_y=share(2))


def test_prepare_gives_a_general_point_by_global_index() -> None:
    class Holder(Module):
        def __init__(self, index: tuple[slice, ...] | None = None) -> None:
            self.weight = Parameter((4, 6), index, initial=lambda p, seed, xp: xp.zeros(p.local_shape))

    index = (slice(1, 3), slice(0, 6))
    (whole,), (part,) = prepare(Holder(), 3), prepare(Holder(index), 3)
    assert (whole.data != 0).all() and whole.data.dtype == np.float64
    np.testing.assert_array_equal(part.data, whole.data[index])


def test_draw_and_inner_follow_the_layout() -> None:
    solo = Solo()
    a, b = draw((3, 2), "I", solo), draw((3, 2), "V", solo)
    np.testing.assert_array_equal(a, draw((3, 2), "I", solo))
    assert (a != b).all()
    assert abs(inner(a, b, "V", solo) - float((a * b).sum())) < 1e-14


@pytest.mark.mpi
def test_draw_and_inner_on_ranks(world: Any) -> None:
    from hpcmp.comm.mesh import Mesh

    with Mesh(world, tp=world.size) as mesh:
        tp = mesh["tp"]
        same, own = draw((3,), "I", tp), draw((3,), "V", tp)
        everyone = mesh.gather_objects((same, own))
        assert all((a == same).all() for a, _ in everyone)
        assert len({tuple(b) for _, b in everyone}) == tp.size
        assert abs(inner(same, same, "I", tp) - same @ same) < 1e-14
        assert abs(inner(own, own, "V", tp) - sum(b @ b for _, b in everyone)) < 1e-13
        if tp.size > 1:
            with pytest.raises(AssertionError, match="differs between ranks"):
                inner(own, own, "I", tp)


@pytest.mark.mpi
def test_complete_adds_overlapping_slabs_where_they_overlap(world: Any) -> None:
    from hpcmp.comm.mesh import Mesh

    with Mesh(world, tp=world.size) as mesh:
        tp = mesh["tp"]
        p = Parameter((tp.size + 1, 2), (slice(tp.rank, tp.rank + 2), slice(0, 2)), shared=("tp",), overlaps=True)
        p.grad = np.full((2, 2), float(1 + tp.rank))
        first = 1 + tp.rank + (tp.rank if tp.rank else 0)
        last = 1 + tp.rank + (tp.rank + 2 if tp.rank + 1 < tp.size else 0)
        np.testing.assert_array_equal(complete(p, tp), [[first, first], [last, last]])
        p.shared = ()
        np.testing.assert_array_equal(complete(p, tp), p.grad)


@pytest.mark.mpi
@pytest.mark.parametrize("wrong", [0.0, 1e-9])
def test_equals_serial_sees_one_part_in_a_thousand_million(world: Any, wrong: float) -> None:
    from hpcmp.comm.mesh import Mesh

    with Mesh(world, tp=world.size) as mesh:
        cursor = Cursor()
        cursor.place = Place(length=5)
        parallel = ModelParallel(mesh["tp"], cursor)

        def build(p: ModelParallel) -> Module:
            return Tanh(p, wrong if p is parallel and p.tp.rank == p.tp.size // 2 else 0.0)

        if not wrong:
            errors = equals_serial(build, parallel, X, cut_x=share(2), cut_y=share(2))
            assert set(errors) == {"output", "input", "weight"} and max(errors.values()) < 1e-14
            return
        with pytest.raises(AssertionError, match=r"Tanh on \d ranks differs from serial: input: .*e-(09|10)"):
            equals_serial(build, parallel, X, cut_x=share(2), cut_y=share(2))


def test_equals_serial_refuses_other_parameters_and_shapes() -> None:
    serial: list[bool] = []

    class Other(Tanh):
        def __init__(self, parallel: ModelParallel) -> None:
            super().__init__(parallel)
            if not serial:
                self.bias = Parameter((7,))
            serial.append(True)

    with pytest.raises(AssertionError, match="parameters .* and serial .*bias"):
        equals_serial(Other, ModelParallel(), X, cut_x=share(2), cut_y=share(2))
    with pytest.raises(AssertionError, match=r"output has shape \[\(5, 2, 7\)\], not \[\(5, 1, 7\)\]"):
        equals_serial(Tanh, ModelParallel(), X, cut_x=share(2), cut_y=lambda y, p: y[:, :1])


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_example_of_the_page_runs(
    ranks: int, tmp_path: Path, run_mpi: Callable[..., CompletedProcess[str]]
) -> None:
    path = tmp_path / "scale.py"
    path.write_text(example())
    env = {"PYTHONPATH": str(DOCS.parents[1])}
    done = run_mpi(ranks, [sys.executable, str(path)], env=env)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\{'output': '\de.\d\d', 'input': '\de.\d\d', 'weight': '\de.\d\d'\}", done.stdout)


def test_the_error_that_the_page_plants_is_found(tmp_path: Path, run_mpi: Callable[..., CompletedProcess[str]]) -> None:
    path = tmp_path / "scale.py"
    wrong = example().replace("return Rotate(self.comm, -self.distance)", "return Rotate(self.comm, self.distance)")
    path.write_text(wrong)
    done = run_mpi(3, [sys.executable, str(path)], env={"PYTHONPATH": str(DOCS.parents[1])})
    assert done.returncode != 0
    assert "AssertionError: Rotate: <A x, y> = " in done.stderr
