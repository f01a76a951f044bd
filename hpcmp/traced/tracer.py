"""Tracer: an array that writes down on a tape what is computed from it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, NoReturn

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import DTypeLike

from ..arrays import Array
from .rules import CONSTANT, RULES
from .shapes import Pullback, Shape, astype
from .tape import Node, Tape


class Tracer(NDArrayOperatorsMixin):
    """An array inside a traced function. It takes NumPy's operators, functions (NEP 13 and 18) and methods.

    What has no rule, would change an array in place or would turn the tracer into a plain array raises TypeError:
    a gradient is never lost in silence. ``stop_gradient`` is the way to lose one on purpose.
    """

    __slots__ = ("place", "tape", "value")

    def __init__(self, value: Array, tape: Tape, place: int) -> None:
        self.value, self.tape, self.place = value, tape, place

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method != "__call__":
            raise _untraced(f"{ufunc.__name__}.{method}")
        return _apply(ufunc, *inputs, **kwargs)

    def __array_function__(self, func: Any, types: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return _apply(func, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(np.ndarray, name):
            raise AttributeError(f"a traced array has no attribute {name!r}")
        if callable(getattr(np.ndarray, name)) and hasattr(np, name):
            return functools.partial(getattr(np, name), self)  # x.sum(0) is np.sum(x, 0)
        raise _untraced(f"ndarray.{name}")

    @property
    def shape(self) -> Shape:
        return tuple(self.value.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(self.value.size)

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = self.value.dtype
        return dtype

    @property
    def T(self) -> Any:
        return np.transpose(self)

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key: Any) -> Any:
        return _apply(operator.getitem, self, key)

    def __pow__(self, other: Any) -> Any:
        return _apply(operator.pow, self, other)  # as arrays do: squares and roots are much faster than np.power

    def reshape(self, *shape: Any) -> Any:
        return _apply(np.reshape, self, shape[0] if len(shape) == 1 else shape)

    def transpose(self, *axes: Any) -> Any:
        return _apply(np.transpose, self, axes[0] if len(axes) == 1 else axes or None)

    def clip(self, min: Any = None, max: Any = None) -> Any:
        return _apply(np.clip, self, min, max)

    def flatten(self) -> Any:
        return _apply(np.ravel, self)

    def astype(self, dtype: DTypeLike) -> Any:
        return _apply(astype, self, dtype) if is_float(np.dtype(dtype)) else astype(self.value, dtype)

    def __repr__(self) -> str:
        return f"Tracer({self.value!r})"

    def _convert(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "a traced array cannot become a plain array, a number or a condition, because its gradient would be lost: "
            "use NumPy's functions throughout, or stop_gradient(x) where no gradient is meant"
        )

    def _change(self, *args: Any) -> NoReturn:
        raise _in_place()

    __array__ = __float__ = __int__ = __bool__ = _convert
    __setitem__ = __delitem__ = _change


def stop_gradient(x: Any) -> Array:
    """x itself as a plain array: a constant of the function, through which no gradient flows."""
    return x.value if isinstance(x, Tracer) else x


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether arrays of this dtype have gradients: all floats do, integers and booleans do not; complex is refused."""
    if dtype.kind in "fbiu" or dtype.name == "bfloat16":
        return dtype.kind not in "biu"
    raise TypeError(f"arrays of dtype {dtype} are not traced: use a float dtype, or write a Module")


def _apply(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call ``function`` on the plain arrays, and record on the tape how to pull gradients back to its operands."""
    name = getattr(function, "__name__", str(function))
    if kwargs.pop("out", None) is not None:
        raise _in_place()
    operands = [_plain(arg) for arg in args]
    if function in CONSTANT:
        return function(*operands, **{key: _plain(value) for key, value in kwargs.items()})
    if function not in RULES:
        raise _untraced(name)
    if any(_tracers(tuple(kwargs.values()), None)):
        raise TypeError(f"{name}: pass traced arrays by position, not by keyword")
    y = function(*operands, **kwargs)
    try:
        pullbacks = RULES[function](y, *operands, **kwargs)
    except TypeError as error:
        raise _untraced(f"{name} with these arguments", str(error)) from error
    if callable(pullbacks):
        pullbacks = (pullbacks,)

    traced = list(_tracers(args, pullbacks))
    tape = traced[0][0].tape
    if any(tracer.tape is not tape for tracer, _ in traced):
        raise TypeError(f"{name}: an operand was kept from another call of the traced function")
    if not is_float(y.dtype):
        raise TypeError(
            f"{name} gave {y.dtype}, through which no gradient flows: use stop_gradient(x) if none is meant"
        )
    sources = tuple((tracer.place, pullback) for tracer, pullback in traced if callable(pullback))
    if len(sources) < len(traced):
        raise _untraced(f"the gradient of {name} with respect to one of these operands")
    late = all(tape.nodes[place].late for place, _ in sources)
    return Tracer(y, tape, tape.record(Node(y.shape, y.dtype, late, sources)))


def _plain(arg: Any) -> Any:
    """An argument with the arrays in the place of tracers, also inside lists and tuples."""
    if isinstance(arg, list):
        return [_plain(item) for item in arg]
    if isinstance(arg, tuple):
        return tuple(_plain(item) for item in arg)
    return stop_gradient(arg)


def _tracers(args: Any, pullbacks: Any) -> Iterator[tuple[Tracer, Pullback | None]]:
    """Every tracer among the arguments, also inside lists and tuples, with its pullback."""
    for arg, pullback in zip_longest(args, pullbacks if isinstance(pullbacks, list | tuple) else ()):
        if isinstance(arg, Tracer):
            yield arg, pullback
        elif isinstance(arg, list | tuple):
            yield from _tracers(arg, pullback)


def _untraced(what: str, why: str = "there is no rule for it in hpcmp.traced.RULES") -> TypeError:
    return TypeError(
        f"{what} is not traced ({why}): use functions that have a rule, add a rule, or write a Module with its backward"
    )


def _in_place() -> TypeError:
    return TypeError("a traced array cannot be changed in place: write x = x + y for x += y, np.where for x[mask] = y")
