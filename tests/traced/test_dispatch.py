"""The same function over any array library that speaks NumPy's protocols."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.lib.mixins import NDArrayOperatorsMixin

import hpcmp.traced
from hpcmp.traced import Traced
from hpcmp.wgrad import now
from tests.traced.cases import CASES, Case

by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


class Foreign(NDArrayOperatorsMixin):
    """An array of another library, as strict as CuPy: it never becomes a NumPy array and meets only its own kind."""

    def __init__(self, value: Any) -> None:
        self.value = np.asarray(value)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a foreign array was converted to a NumPy array")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method != "__call__" or not all(isinstance(x, Foreign | np.generic | int | float) for x in inputs):
            return NotImplemented
        return wrapped(ufunc(*unwrapped(inputs), **kwargs))

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if not all(issubclass(t, Foreign) for t in types):
            return NotImplemented
        if func is np.where and not isinstance(args[0], Foreign):
            raise TypeError("the condition must be an array")
        return wrapped(func(*unwrapped(args), **unwrapped(kwargs)))

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.value, name)
        if not callable(found):
            return wrapped(found)
        return lambda *args, **kwargs: wrapped(found(*unwrapped(args), **unwrapped(kwargs)))

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, key: Any) -> Any:
        return Foreign(self.value[unwrapped(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self.value[unwrapped(key)] = unwrapped(value)


def wrapped(x: Any) -> Any:
    if isinstance(x, tuple | list):
        return type(x)(wrapped(item) for item in x)
    return Foreign(x) if isinstance(x, np.ndarray | np.generic) else x


def unwrapped(x: Any) -> Any:
    if isinstance(x, tuple | list):
        return type(x)(unwrapped(item) for item in x)
    if isinstance(x, dict):
        return {key: unwrapped(item) for key, item in x.items()}
    return x.value if isinstance(x, Foreign) else x


def returning(function: Any) -> Any:
    return lambda *args, **kwargs: wrapped(function(*unwrapped(args), **unwrapped(kwargs)))


FOREIGN = SimpleNamespace(
    **{name: returning(getattr(np, name)) for name in ("asarray", "zeros", "arange")},
    add=SimpleNamespace(at=lambda x, key, y: np.add.at(x.value, unwrapped(key), unwrapped(y))),
)


def gradients(case: Case, convert: Any) -> tuple[Any, Any]:
    layer = Traced(case.fn)
    y, saved = layer.forward(tuple(convert(a) for a in case.arrays()))
    dy = np.random.default_rng(1).normal(size=y.shape)
    return y, layer.backward(convert(np.asarray(dy)), saved, now)


def compare(got: Any, as_numpy: Any, wanted: Any) -> None:
    assert not isinstance(got, np.ndarray | np.generic)
    assert (got is None) == (wanted is None)
    if wanted is not None:
        np.testing.assert_allclose(as_numpy, wanted, rtol=1e-12, atol=1e-14)


@by_case
def test_every_rule_goes_through_dispatch(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, expected_dx = gradients(case, lambda a: a)
    monkeypatch.setattr(hpcmp.traced, "array_module", lambda x: FOREIGN)
    monkeypatch.setattr(hpcmp.traced.shapes, "array_module", lambda x: FOREIGN)
    y, dx = gradients(case, Foreign)
    compare(y, y.value, expected)
    for got, wanted in zip(dx, expected_dx, strict=True):
        compare(got, unwrapped(got), wanted)


@pytest.mark.gpu
@by_case
def test_cupy(case: Case) -> None:
    import cupy

    expected, expected_dx = gradients(case, lambda a: a)
    y, dx = gradients(case, cupy.asarray)
    compare(y, y.get(), expected)
    for got, wanted in zip(dx, expected_dx, strict=True):
        compare(got, None if got is None else got.get(), wanted)
