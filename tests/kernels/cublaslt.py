"""An interpreter of cuBLASLt's descriptors on the host: does with NumPy exactly what they say, or refuses.

It has the functions of ``nvmath.bindings.cublasLt`` that hpcmp calls, with their names, arguments and numbers. Memory
may only be touched within arrays that were ``lent``.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

from hpcmp.arrays import dtype_of
from hpcmp.kernels.cuda import multiply
from hpcmp.kernels.cuda.choices import Choices
from hpcmp.kernels.cuda.lt import Lt

DTYPES = {0: np.dtype("float32"), 1: np.dtype("float64"), 2: np.dtype("float16"), 14: dtype_of("bfloat16")}


#: The dtypes of a and of d that the library multiplies.
PAIRS = {("float32", "float32"), ("float64", "float64")} | {
    (half, out) for half in ("float16", "bfloat16") for out in (half, "float32")
}


class MatmulDescAttribute(enum.IntEnum):
    TRANSA = 3
    TRANSB = 4
    EPILOGUE = 7
    BIAS_POINTER = 8


class MatmulPreferenceAttribute(enum.IntEnum):
    MAX_WORKSPACE_BYTES = 1
    REDUCTION_SCHEME_MASK = 3
    MIN_ALIGNMENT_A_BYTES = 5
    MIN_ALIGNMENT_B_BYTES = 6
    MIN_ALIGNMENT_C_BYTES = 7
    MIN_ALIGNMENT_D_BYTES = 8


class Epilogue(enum.IntEnum):
    DEFAULT = 1
    BIAS = 4


class cuBLASLtError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"cuBLASLt status {status}")
        self.status = status


class Memory:
    """Device memory as ``cupy.cuda.alloc`` gives it."""

    def __init__(self, size: int, lent: list[np.ndarray[Any, Any]]) -> None:
        self.array = np.zeros(size + 256, np.uint8)
        self.ptr = -(-self.array.ctypes.data // 256) * 256
        lent.append(self.array)


class CublasLt:
    """The binding. algorithms: how many the heuristics know. used: the first byte of each product's algorithm."""

    MatmulDescAttribute, MatmulPreferenceAttribute = MatmulDescAttribute, MatmulPreferenceAttribute
    Epilogue, cuBLASLtError = Epilogue, cuBLASLtError

    def __init__(self, algorithms: int = 8, version: int = 130100) -> None:
        self.algorithms, self.version = algorithms, version
        self.things: dict[int, dict[Any, Any]] = {}
        self.numbers = itertools.count(1000)
        self.lent: list[np.ndarray[Any, Any]] = []
        self.used: list[int] = []
        self.promised: dict[int, list[int]] = {}
        self.failed: set[int] = set()  # algorithms that are recommended with a state that is no success

    def lend(self, *arrays: Any) -> None:
        """Allow a product to touch the memory that these arrays are views of."""
        for x in arrays:
            while isinstance(x.base, np.ndarray):
                x = x.base
            if not any(x is known for known in self.lent):
                self.lent.append(x)

    def alloc(self, size: int) -> Memory:
        return Memory(size, self.lent)

    def _new(self, **values: Any) -> int:
        number = next(self.numbers)
        self.things[number] = values
        return number

    def create(self) -> int:
        return self._new(kind="handle")

    def get_version(self) -> int:
        return self.version

    def matmul_desc_create(self, compute_type: int, scale_type: int) -> int:
        assert (compute_type, scale_type) in ((68, 0), (70, 1))
        return self._new(kind="matmul", scale=DTYPES[scale_type])

    def matmul_desc_set_attribute(self, matmul_desc: int, attr: int, buf: int, size_in_bytes: int) -> None:
        assert size_in_bytes == (8 if attr == MatmulDescAttribute.BIAS_POINTER else 4)
        value = int.from_bytes(ctypes.string_at(buf, size_in_bytes), "little")
        self.things[matmul_desc][MatmulDescAttribute(attr)] = value

    def matrix_layout_create(self, type: int, rows: int, cols: int, ld: int) -> int:
        assert rows > 0 and cols > 0 and ld >= rows
        return self._new(kind="layout", dtype=DTYPES[type], rows=rows, cols=cols, ld=ld)

    def matmul_preference_create(self) -> int:
        return self._new(kind="preference")

    def matmul_preference_set_attribute(self, pref: int, attr: int, buf: int, size_in_bytes: int) -> None:
        assert size_in_bytes == (8 if attr == MatmulPreferenceAttribute.MAX_WORKSPACE_BYTES else 4)
        value = int.from_bytes(ctypes.string_at(buf, size_in_bytes), "little")
        self.things[pref][MatmulPreferenceAttribute(attr)] = value

    def matmul_preference_destroy(self, pref: int) -> None:
        del self.things[pref]

    def matmul_algo_get_heuristic(
        self, light_handle: int, operation_desc: int, adesc: int, bdesc: int, cdesc: int, ddesc: int, preference: int,
        requested_algo_count: int, heuristic_results_array: int, return_algo_count: int,
    ) -> None:  # fmt: skip
        wish, names = self.things[preference], MatmulPreferenceAttribute
        assert wish[names.MAX_WORKSPACE_BYTES] == 32 << 20 and wish[names.REDUCTION_SCHEME_MASK] == 2
        self.promised[operation_desc] = [wish[names[f"MIN_ALIGNMENT_{x}_BYTES"]] for x in "ABD"]
        count = min(self.algorithms, requested_algo_count)
        if not count:
            raise cuBLASLtError(15)
        results = np.zeros((count, 96), np.uint8)
        results[:, :64] = np.arange(1, count + 1)[:, None]
        results[:, 72] = [number in self.failed for number in range(1, count + 1)]
        ctypes.memmove(heuristic_results_array, results.ctypes.data, results.nbytes)
        ctypes.memmove(return_algo_count, np.array([count], np.int32).ctypes.data, 4)

    def matmul_algo_check(
        self, light_handle: int, operation_desc: int, adesc: int, bdesc: int, cdesc: int, ddesc: int, algo: int,
        result: int,
    ) -> None:  # fmt: skip
        given = np.frombuffer(ctypes.string_at(algo, 64), np.uint8)
        if not 1 <= given[0] <= self.algorithms or (given != given[0]).any():
            raise cuBLASLtError(7)
        self.promised.setdefault(operation_desc, [1, 1, 1])

    def matmul(
        self, light_handle: int, compute_desc: int, alpha: int, a: int, adesc: int, b: int, bdesc: int, beta: int,
        c: int, cdesc: int, d: int, ddesc: int, algo: int, workspace: int, workspace_size_in_bytes: int, stream: int,
    ) -> None:  # fmt: skip
        assert self.things[light_handle]["kind"] == "handle" and c == d and cdesc == ddesc
        given = np.frombuffer(ctypes.string_at(algo, 64), np.uint8)
        assert 1 <= given[0] <= self.algorithms and (given == given[0]).all()
        self.used.append(int(given[0]))
        self._within(workspace, workspace_size_in_bytes)
        for address, promised in zip((a, b, d), self.promised[compute_desc], strict=True):
            assert address % promised == 0
        asked = self.things[compute_desc]
        x, y, z = self._matrix(a, adesc), self._matrix(b, bdesc), self._matrix(d, ddesc)
        kinds = x.dtype.name, z.dtype.name
        assert kinds in PAIRS and y.dtype == x.dtype and (asked["scale"] == np.float64) == (kinds[0] == "float64")
        one, factor = (
            np.frombuffer(ctypes.string_at(at, asked["scale"].itemsize), asked["scale"])[0] for at in (alpha, beta)
        )
        x = x.T if asked.get(MatmulDescAttribute.TRANSA, 0) else x
        y = y.T if asked.get(MatmulDescAttribute.TRANSB, 0) else y
        assert (x.shape[0], y.shape[1]) == z.shape and x.shape[1] == y.shape[0] and one == 1
        made = x.astype(asked["scale"]) @ y.astype(asked["scale"])
        if factor:
            made = made + factor * z.astype(asked["scale"])
        if asked.get(MatmulDescAttribute.EPILOGUE, Epilogue.DEFAULT) == Epilogue.BIAS:
            at = asked[MatmulDescAttribute.BIAS_POINTER]
            assert at % 16 == 0
            self._within(at, z.shape[0] * z.itemsize)
            made = made + np.frombuffer(ctypes.string_at(at, z.shape[0] * z.itemsize), z.dtype)[:, None].astype(
                made.dtype
            )
        z[...] = made.astype(z.dtype)

    def _matrix(self, address: int, layout: int) -> np.ndarray[Any, Any]:
        """The column-major matrix at an address, as a view of that memory."""
        told = self.things[layout]
        size, ld = told["dtype"].itemsize, told["ld"]
        length = ((told["cols"] - 1) * ld + told["rows"]) * size
        self._within(address, length)
        flat = np.frombuffer((ctypes.c_char * length).from_address(address), np.uint8).view(told["dtype"])
        return np.lib.stride_tricks.as_strided(flat, (told["rows"], told["cols"]), (size, ld * size))

    def _within(self, address: int, length: int) -> None:
        assert any(x.ctypes.data <= address and address + length <= x.ctypes.data + x.nbytes for x in self.lent), (
            "outside of what was lent"
        )


def make_lt(binding: CublasLt, choices: Choices | None = None, seconds: Any = None, device: str = "here") -> Lt:
    """hpcmp's cuBLASLt over the interpreter. seconds: what times a launch."""
    return Lt(binding, lambda: 7, binding.alloc, seconds or (lambda call: 1.0), device, choices or Choices())


@contextlib.contextmanager
def multiplying(lt: Lt) -> Iterator[CublasLt]:
    """``multiply`` asks this cuBLASLt, and nothing else, for products of NumPy arrays, which are lent to it."""
    binding: CublasLt = lt.binding

    def address(x: np.ndarray[Any, Any]) -> int:
        binding.lend(x)
        return x.ctypes.data

    with mock.patch.multiple(multiply, planners=lambda: (lt.plan,), address=address, _plans={}):
        yield binding
