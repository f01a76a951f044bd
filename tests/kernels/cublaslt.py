"""An interpreter of cuBLASLt's descriptors on the host: does with NumPy exactly what they say, or refuses.

It has the functions of ``nvmath.bindings.cublasLt`` that hpcmp calls, with their names, arguments and numbers. Memory
may only be touched within arrays that were ``lent``.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np

from hpcmp.arrays import dtype_of
from hpcmp.kernels import reference
from hpcmp.kernels.cuda import multiply
from hpcmp.kernels.cuda.choices import Choices
from hpcmp.kernels.cuda.lt import TYPES, Lt
from tests.kernels.cublaslt_names import AUX, LONG, Epilogue, MatmulDescAttribute, MatmulPreferenceAttribute

DTYPES = {0: np.dtype("float32"), 1: np.dtype("float64"), 2: np.dtype("float16"), 14: dtype_of("bfloat16")}
DTYPES |= {28: np.dtype(ml_dtypes.float8_e4m3fn), 29: np.dtype(ml_dtypes.float8_e5m2)}


#: The dtypes of a and of d that the library multiplies.
PAIRS = {("float32", "float32"), ("float64", "float64")} | {
    (half, out) for half in ("float16", "bfloat16") for out in (half, "float32")
}


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
        self.eight = True  # whether the GPU multiplies numbers of 8 bits
        self.refusal = 15  # the status of what there is no algorithm for
        self.failed: set[int] = set()  # algorithms that are recommended with a state that is no success
        self.epilogues = set(Epilogue)  # those that there are algorithms for
        self.made: list[Epilogue] = []  # each product's

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
        assert size_in_bytes == (8 if attr in LONG else 4)
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
        self._check_epilogue(operation_desc, adesc, ddesc)
        count = min(self.algorithms if self._epilogue(operation_desc) in self.epilogues else 0, requested_algo_count)
        if not count or not self._fits(operation_desc, adesc, bdesc, ddesc):
            raise cuBLASLtError(self.refusal)
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
        self._check_epilogue(operation_desc, adesc, ddesc)

    def matmul(
        self, light_handle: int, compute_desc: int, alpha: int, a: int, adesc: int, b: int, bdesc: int, beta: int,
        c: int, cdesc: int, d: int, ddesc: int, algo: int, workspace: int, workspace_size_in_bytes: int, stream: int,
    ) -> None:  # fmt: skip
        assert self.things[light_handle]["kind"] == "handle" and cdesc == ddesc
        given = np.frombuffer(ctypes.string_at(algo, 64), np.uint8)
        assert 1 <= given[0] <= self.algorithms and (given == given[0]).all()
        self.used.append(int(given[0]))
        self._within(workspace, workspace_size_in_bytes)
        promised = self.promised[compute_desc]
        for address, aligned in zip((a, b, d, c), (*promised, promised[2]), strict=True):
            assert address % aligned == 0
        asked = self.things[compute_desc]
        x, y, z = self._matrix(a, adesc), self._matrix(b, bdesc), self._matrix(d, ddesc)
        kinds, scale = (x.dtype.name, z.dtype.name), self._scale(compute_desc, adesc, bdesc, ddesc, a, b, d)
        assert scale is not None or (kinds in PAIRS and y.dtype == x.dtype)
        assert (asked["scale"] == np.float64) == (kinds[0] == "float64")
        one, factor = (
            np.frombuffer(ctypes.string_at(at, asked["scale"].itemsize), asked["scale"])[0] for at in (alpha, beta)
        )
        x = x.T if asked.get(MatmulDescAttribute.TRANSA, 0) else x
        y = y.T if asked.get(MatmulDescAttribute.TRANSB, 0) else y
        assert (x.shape[0], y.shape[1]) == z.shape and x.shape[1] == y.shape[0] and one == 1
        made = x.astype(asked["scale"]) @ y.astype(asked["scale"])
        made = made if scale is None else made * scale
        if factor:
            made = made + factor * self._matrix(c, cdesc).astype(asked["scale"])
        self._check_epilogue(compute_desc, adesc, ddesc)
        self.made.append(self._epilogue(compute_desc))
        z[...] = self._finish(asked, x, y, made, z.dtype).astype(z.dtype)

    def _fits(self, desc: int, adesc: int, bdesc: int, ddesc: int) -> bool:
        """What NVIDIA's documentation asks of products of 8 bits: sizes and strides of multiples of 16 bytes, "TN", not
        two of E5M2, and no biases of float32, which a result in float32 would have here."""
        asked, a, b, d = (self.things[i] for i in (desc, adesc, bdesc, ddesc))
        if a["dtype"].itemsize > 1:
            return bool(b["dtype"] == a["dtype"])
        turns = asked.get(MatmulDescAttribute.TRANSA, 0), asked.get(MatmulDescAttribute.TRANSB, 0)
        fits = turns == (1, 0) and not any(x[n] % 16 for x in (a, b, d) for n in ("rows", "cols", "ld"))
        fits = fits and (a["dtype"], b["dtype"]) != (DTYPES[29],) * 2 and d["dtype"] in (DTYPES[i] for i in (0, 2, 14))
        return self.eight and fits and (d["dtype"].itemsize == 2 or self._epilogue(desc) == Epilogue.DEFAULT)

    def _scale(self, desc: int, adesc: int, bdesc: int, ddesc: int, *addresses: int) -> np.ndarray[Any, Any] | None:
        """What a product of 8 bits is multiplied by; None for any other, which has none."""
        names = MatmulDescAttribute.A_SCALE_POINTER, MatmulDescAttribute.B_SCALE_POINTER
        if self.things[adesc]["dtype"].itemsize > 1:
            assert not any(name in self.things[desc] for name in names)
            return None
        assert self._fits(desc, adesc, bdesc, ddesc) and not any(address % 16 for address in addresses)
        first, second = (self._vector(self.things[desc][name], 1, np.dtype(np.float32)) for name in names)
        return first * second

    def _epilogue(self, desc: int) -> Epilogue:
        return Epilogue(self.things[desc].get(MatmulDescAttribute.EPILOGUE, Epilogue.DEFAULT))

    def _check_epilogue(self, desc: int, adesc: int, ddesc: int) -> None:
        """What the header and the documentation of cuBLASLt ask of the attributes, where algorithms are asked for, too:
        there the pointers tell what alignment to expect. That DGELU wants k > 1 is in nvmath-python."""
        asked, names, kind, d = self.things[desc], MatmulDescAttribute, self._epilogue(desc), self.things[ddesc]
        sums = kind in (Epilogue.BGRADA, Epilogue.BGRADB)
        pointers = [names.BIAS_POINTER] if sums or kind & Epilogue.BIAS else []
        if kind & AUX:
            pointers += [names.EPILOGUE_AUX_POINTER]
            assert asked[names.EPILOGUE_AUX_LD] % 8 == 0 and asked[names.EPILOGUE_AUX_LD] >= d["rows"]
            assert d["dtype"].itemsize == 2  # it has others, which hpcmp does not ask for
        assert asked["scale"].itemsize == 4 or kind in (Epilogue.DEFAULT, Epilogue.BIAS)
        terms = self.things[adesc]["rows" if asked.get(names.TRANSA, 0) else "cols"]
        assert terms > 1 or kind != Epilogue.DGELU
        for name in pointers:
            assert asked[name] and asked[name] % 16 == 0

    def _finish(self, asked: dict[Any, Any], x: Any, y: Any, made: Any, dtype: Any) -> Any:
        """d, of the product and C in ``made``, and what the epilogue writes beside it. x and y: op(a) and op(b)."""
        names, kind = MatmulDescAttribute, Epilogue(asked.get(MatmulDescAttribute.EPILOGUE, Epilogue.DEFAULT))
        if kind in (Epilogue.BGRADA, Epilogue.BGRADB):
            sums = x.astype(made.dtype).sum(1) if kind == Epilogue.BGRADA else y.astype(made.dtype).sum(0)
            self._vector(asked[names.BIAS_POINTER], len(sums), dtype)[...] = sums.astype(dtype)
        if kind & Epilogue.BIAS:
            made = made + self._vector(asked[names.BIAS_POINTER], len(made), dtype)[:, None].astype(made.dtype)
        if kind & AUX:
            layout = self.matrix_layout_create(TYPES[dtype.name], *made.shape, asked[names.EPILOGUE_AUX_LD])
            aux = self._matrix(asked[names.EPILOGUE_AUX_POINTER], layout)
            if kind == Epilogue.DGELU:
                return reference.gelu_backward(made, aux.astype(made.dtype))
            aux[...] = made.astype(dtype)
            return reference.gelu(made)
        return made

    def _vector(self, address: int, length: int, dtype: Any) -> np.ndarray[Any, Any]:
        self._within(address, length * dtype.itemsize)
        return np.frombuffer((ctypes.c_char * (length * dtype.itemsize)).from_address(address), np.uint8).view(dtype)

    def _matrix(self, address: int, layout: int) -> np.ndarray[Any, Any]:
        """The column-major matrix at an address, as a view of that memory."""
        told = self.things[layout]
        size, ld = told["dtype"].itemsize, told["ld"]
        length = ((told["cols"] - 1) * ld + told["rows"]) * size
        self._within(address, length)
        flat = (ctypes.c_char * length).from_address(address)
        return np.ndarray((told["rows"], told["cols"]), told["dtype"], flat, strides=(size, ld * size))

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
