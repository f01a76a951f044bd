"""Compiles and launches the CUDA kernels under ``sources``.

Each source holds kernels that are templates; ``declare`` says for which template arguments, and so what CI compiles and
the tests run. CuPy compiles the kernels of a source that share their arguments when one is first launched, and keeps
the result on disk (CUPY_CACHE_DIR). Kernels run on CuPy's current stream.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...arrays import Array
from ...random import DropoutMask

Arguments = tuple[Any, ...]

#: The types of numbers that kernels read and write.
FLOATS = ("float", "double", "__half", "__nv_bfloat16")

#: By source and kernel, the template arguments that it is compiled for.
INSTANCES: dict[str, dict[str, list[tuple[str, ...]]]] = {}

_FOLDER = Path(__file__).with_name("sources")
_NAMES = dict(zip(("float32", "float64", "float16", "bfloat16"), FLOATS, strict=True)) | {
    "int32": "int",
    "int64": "long long",
    "uint16": "unsigned short",
    "bool": "bool",
    "True": "true",
    "False": "false",
}
_SHARED = 48 << 10  # bytes of dynamic shared memory that a kernel may have without asking for more


class Kernel(Protocol):
    """A compiled kernel, as CuPy's RawKernel is one."""

    max_dynamic_shared_size_bytes: int

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: Arguments, shared_mem: int = 0) -> None: ...


class Backend(Protocol):
    """What kernels run on."""

    @property
    def multiprocessors(self) -> int: ...

    def compile(self, source: str, expressions: tuple[str, ...]) -> dict[str, Kernel]:
        """The kernels of a source named by ``expressions``, such as ``rms_norm<float>``."""


class Cupy:
    """A GPU, through CuPy."""

    @functools.cached_property
    def multiprocessors(self) -> int:
        import cupy

        return int(cupy.cuda.Device().attributes["MultiProcessorCount"])

    def compile(self, source: str, expressions: tuple[str, ...]) -> dict[str, Kernel]:
        import cupy

        module = cupy.RawModule(code=text(source), options=("-std=c++17",), name_expressions=expressions)
        return {expression: module.get_function(expression) for expression in expressions}


_backend: Backend = Cupy()
_kernels: dict[Any, Kernel] = {}
_witness: Callable[[Arguments], None] | None = None


def declare(source: str, kernels: dict[str, Iterable[str | tuple[Any, ...]]]) -> None:
    """``sources/<source>.cu`` has these kernels, each compiled for these template arguments: one name of a type, or a
    tuple of names, integers and booleans."""
    INSTANCES[source] = {
        name: [tuple(map(_name, a if isinstance(a, tuple) else (a,))) for a in arguments]
        for name, arguments in kernels.items()
    }


def launch(
    source: str,
    kernel: str,
    types: tuple[Any, ...],
    grid: tuple[int, ...],
    block: tuple[int, ...],
    *args: Any,
    shared: int = 0,
) -> None:
    """Launch ``kernel<types>`` (dtypes, integers, booleans: one of those declared); an empty grid does nothing.

    args: arrays go as pointers to their first number (whatever their strides) and None as a null pointer, int as
    ``long long``, float as ``double``, NumPy scalars as what they are, and NumPy arrays with named fields, of one
    element, as structs by value. shared: bytes of dynamic shared memory.
    """
    if 0 in grid:
        return
    found = _kernels.get((source, kernel, types)) or _compiled(source, kernel, types)
    if shared > _SHARED:
        found.max_dynamic_shared_size_bytes = shared
    if _witness is not None:
        _witness(args)
    found(grid, block, args, shared_mem=shared)


def multiprocessors() -> int:
    """Of the device that kernels run on."""
    return _backend.multiprocessors


def expressions(source: str) -> list[str]:
    """What a source is compiled for, as C++ names such as ``rms_norm<float>``."""
    return [_expression(name, types) for name, each in INSTANCES[source].items() for types in each]


def text(source: str) -> str:
    """A source with the headers beside it in their places, so that a cache by its text is right."""
    return _with_headers(f"{source}.cu", set())


@contextmanager
def running_on(backend: Backend) -> Iterator[None]:
    """Run kernels on another backend than CuPy."""
    global _backend, _kernels
    before = _backend, _kernels
    _backend, _kernels = backend, {}
    try:
        yield
    finally:
        _backend, _kernels = before


@contextmanager
def witnessed(witness: Callable[[Arguments], None]) -> Iterator[None]:
    """Show ``witness`` the arguments of each launch in the body."""
    global _witness
    before, _witness = _witness, witness
    try:
        yield
    finally:
        _witness = before


def _compiled(source: str, kernel: str, types: tuple[Any, ...]) -> Kernel:
    """The kernel, compiled with those of its source that have the same template arguments."""
    named = tuple(map(_name, types))
    if named not in INSTANCES[source][kernel]:
        raise KeyError(f"{_expression(kernel, named)} is not declared in {source}.cu")
    alike = {name: _expression(name, named) for name, each in INSTANCES[source].items() if named in each}
    made = _backend.compile(source, tuple(alike.values()))
    for name, expression in alike.items():
        _kernels[source, name, types] = made[expression]
    return _kernels[source, kernel, types]


def _name(argument: Any) -> str:
    """A template argument in C++: of a dtype, a type's name, an integer or a boolean."""
    text = argument.name if isinstance(argument, np.dtype) else str(argument)
    return _NAMES.get(text, text)


def _expression(kernel: str, types: tuple[str, ...]) -> str:
    return f"{kernel}<{', '.join(types)}>" if types else kernel


def _with_headers(file: str, seen: set[str]) -> str:
    def include(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return ""
        seen.add(name)
        return _with_headers(name, seen)

    return re.sub(r'^#include "(.+)"$', include, (_FOLDER / file).read_text(), flags=re.M)


#: ``Mask`` of common.cuh: its fields, and the dtype of an array that holds one.
_FIELDS = struct.Struct("16qd2I")
MASK = np.dtype([("mask", f"V{_FIELDS.size}")])


def mask_arguments(mask: DropoutMask, rows: tuple[int, ...], xp: Any) -> tuple[Array, ...]:
    """What a kernel is given of a mask whose rows have this shape, of at most three axes: a ``Mask``, the key, i, j and
    extra, which may be None.

    Raises ValueError for more than two runs of columns.
    """
    if len(mask.runs) > 2 or len(rows) > 3:
        raise ValueError(f"a mask of {len(mask.runs)} runs and {len(rows)} axes of rows: kernels take 2 and 3")
    indices = [None if isinstance(v, int) else xp.asarray(v, dtype=np.int64) for v in (mask.i, mask.j, mask.extra)]
    first, *more = mask.runs
    packed = _FIELDS.pack(
        *(1,) * (3 - len(rows)),
        *rows,
        *(stride for index in indices for stride in _strides(index)),
        mask.extra if isinstance(mask.extra, int) else 0,
        first.start,
        more[0].start if more else 0,
        first.stop - first.start,
        1 / (1 - mask.rate),
        mask.threshold,
        0,
    )
    return np.frombuffer(packed, MASK), xp.asarray(mask.key, dtype=np.int64), *indices


def _strides(index: Array | None) -> tuple[int, ...]:
    """In numbers, by axis of a mask's rows; 0 along those that the index does not have."""
    found = [] if index is None else [0 if n == 1 else s // 8 for n, s in zip(index.shape, index.strides, strict=True)]
    return (0,) * (3 - len(found)) + tuple(found)
