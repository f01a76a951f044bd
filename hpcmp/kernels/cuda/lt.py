"""Matrix products by cuBLASLt, through nvmath-python's bindings: planned once, launched on CuPy's current stream.

**Which algorithm.** A product has the same bits in every run only if its algorithm is the same, and on all ranks alike
where ranks make the same product (a router's). So no run chooses by the clock: it takes what cuBLASLt's heuristics
recommend first, a function of the device, the library's version and the product, or what a file says that was made
before the run, and that every rank reads (the environment's HPCMP_GEMM_CHOICES). A run with HPCMP_GEMM_TUNE=FILE makes
such a file: it times the candidates of each product when it is first asked for, adds the fastest to the file, and
computes with the first nevertheless, so that its own results are those of any other run. Whatever the algorithm,
partial sums are added in a fixed order, in the type that is computed in.

**CUDA graphs.** A launch allocates nothing and asks nothing, but for a product's first, which is planned then, and a
stream's first, which gets its workspace then: run a step before capturing one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from .choices import Choices
from .product import Product

#: CUDA's numbers for dtypes (cudaDataType), and for how to compute (cublasComputeType).
TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14, "float8_e4m3fn": 28, "float8_e5m2": 29}
COMPUTE = {"float32": 68, "float64": 70}

WORKSPACE = 32 << 20  # bytes: what NVIDIA recommends for Hopper
_CANDIDATES = 8
_RESULT = 96  # bytes of a cublasLtMatmulHeuristicResult_t: the algorithm's 64, then its workspace's size and its state
_PARTIAL_SUMS = 2  # CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, besides none
_NOT_SUPPORTED, _INVALID = 15, 7  # cublasStatus_t

#: Launches a product: the addresses of its a, b, d, bias and, of one with an epilogue, aux (0 for what it has not); of
#: one of 8 bits also those of two float32 on the device, what its a and its b are multiplied by; ``onto``: of its c.
Launch = Callable[..., None]


class Lt:
    """cuBLASLt on one device.

    binding: ``nvmath.bindings.cublasLt``. stream: gives the stream to launch on. allocate: so many bytes on the device,
    an object with ``ptr``. seconds: how long a launch takes there. device: its name, in ``choices``.
    """

    def __init__(
        self,
        binding: Any,
        stream: Callable[[], int],
        allocate: Callable[[int], Any],
        seconds: Callable[[Callable[[], None]], float],
        device: str,
        choices: Choices,
    ) -> None:
        self.binding, self.stream, self.allocate, self.seconds = binding, stream, allocate, seconds
        self.handle: int = binding.create()
        self.choices, self.here = choices, (device, int(binding.get_version()))
        self.workspaces: dict[int, Any] = {}

    def plan(self, p: Product, bias: int, aux: int = 0, scales: Sequence[int] = ()) -> Launch | None:
        """How to launch a product; None if the library has no algorithm for it. bias, aux, scales: the addresses of the
        first ones."""
        d = _Descriptors(self.binding, p, bias, aux, scales)
        chosen = self.choices.find(*self.here, p)
        if chosen is not None and self._fits(d, chosen):
            return self._launch(d, chosen)
        candidates = self._candidates(d, p)
        if not candidates:
            return None
        if self.choices.tune is not None and chosen is None:
            self._tune(d, p, bias, aux, scales, candidates)
        return self._launch(d, candidates[0])

    def _launch(self, d: _Descriptors, algorithm: Any) -> Launch:
        binding, handle, stream, workspaces = self.binding, self.handle, self.stream, self.workspaces
        attribute = binding.MatmulDescAttribute
        pointer, where = attribute.BIAS_POINTER, d.bias.ctypes.data
        aux_pointer, aux_where = attribute.EPILOGUE_AUX_POINTER, d.aux.ctypes.data
        alpha, beta, algo = d.one.ctypes.data, d.beta.ctypes.data, algorithm.ctypes.data

        def launch(
            a: int, b: int, out: int, bias: int, aux: int = 0, scales: Sequence[int] = (), onto: int = 0,
            kept: Any = algorithm,  # ``algo`` points to it
        ) -> None:  # fmt: skip
            if bias:
                d.bias[0] = bias
                binding.matmul_desc_set_attribute(d.desc, pointer, where, 8)
            if aux:
                d.aux[0] = aux
                binding.matmul_desc_set_attribute(d.desc, aux_pointer, aux_where, 8)
            if scales:
                d.scale(binding, scales)
            on = stream()
            workspace = workspaces.get(on)
            if workspace is None:
                workspace = workspaces[on] = self.allocate(WORKSPACE)
            at = workspace.ptr
            binding.matmul(
                handle, d.desc, alpha, a, d.a, b, d.b, beta, onto or out, d.d, out, d.d, algo, at, WORKSPACE, on
            )  # fmt: skip

        return launch

    def _candidates(self, d: _Descriptors, p: Product) -> list[Any]:
        """The algorithms that the library recommends, the best first."""
        lt, wish = self.binding, self.binding.MatmulPreferenceAttribute
        preference: int = lt.matmul_preference_create()
        a, b, out = p.alignment
        wishes: list[tuple[Any, Any]] = [
            (wish.MAX_WORKSPACE_BYTES, ctypes.c_uint64(WORKSPACE)),
            (wish.REDUCTION_SCHEME_MASK, ctypes.c_uint32(_PARTIAL_SUMS)),
            (wish.MIN_ALIGNMENT_A_BYTES, ctypes.c_uint32(a)),
            (wish.MIN_ALIGNMENT_B_BYTES, ctypes.c_uint32(b)),
            (wish.MIN_ALIGNMENT_C_BYTES, ctypes.c_uint32(out)),
            (wish.MIN_ALIGNMENT_D_BYTES, ctypes.c_uint32(out)),
        ]
        for name, value in wishes:
            lt.matmul_preference_set_attribute(preference, name, ctypes.addressof(value), ctypes.sizeof(value))
        found, count = np.zeros((_CANDIDATES, _RESULT), np.uint8), np.zeros(1, np.int32)
        wanted = preference, _CANDIDATES, found.ctypes.data, count.ctypes.data
        try:
            lt.matmul_algo_get_heuristic(self.handle, d.desc, d.a, d.b, d.d, d.d, *wanted)
        except lt.cuBLASLtError as error:
            if error.status != _NOT_SUPPORTED and not (p.dtype_b and error.status == _INVALID):  # no 8 bits here
                raise
        lt.matmul_preference_destroy(preference)
        return [row[:64].copy() for row in found[: count[0]] if not row[72:76].any()]  # the state: 0 is success

    def _fits(self, d: _Descriptors, algorithm: Any) -> bool:
        """Whether the library itself says that an algorithm from a file is one for this product."""
        found = np.zeros(_RESULT, np.uint8)
        asked = d.desc, d.a, d.b, d.d, d.d, algorithm.ctypes.data, found.ctypes.data
        try:
            self.binding.matmul_algo_check(self.handle, *asked)
        except self.binding.cuBLASLtError:
            return False
        return bool(found[64:72].view(np.uint64)[0] <= WORKSPACE)

    def _tune(
        self, d: _Descriptors, p: Product, bias: int, aux: int, scales: Sequence[int], candidates: list[Any]
    ) -> None:
        """Time the candidates, and add the fastest to the choices: on memory of their own but for the bias, aux and
        scales, of which the product itself writes again what an epilogue writes."""
        columns = p.m if p.transpose_a else p.k, p.k if p.transpose_b else p.n, p.n
        sizes = zip(columns, (p.lda, p.ldb, p.ldd), (p.dtype, p.dtype_b or p.dtype, p.out), strict=True)
        a, b, out = (self.allocate(count * leading * _BYTES[name]) for count, leading, name in sizes)
        addresses = a.ptr, b.ptr, out.ptr, bias, aux, scales
        launches = (partial(self._launch(d, algorithm), *addresses) for algorithm in candidates)
        times = [self.seconds(launch) for launch in launches]
        best = times.index(min(times))
        self.choices.add(*self.here, p, candidates[best], times[best], times[0])


_BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}


class _Descriptors:
    """What cuBLASLt is told of a product; they live as long as its plan, which is as long as the process."""

    def __init__(self, lt: Any, p: Product, bias: int, aux: int, scales: Sequence[int]) -> None:
        wide = "float64" if p.dtype == "float64" else "float32"
        self.desc: int = lt.matmul_desc_create(COMPUTE[wide], TYPES[wide])
        self.one, self.beta = np.ones(1, wide), np.array([p.accumulate or p.onto], wide)
        self.bias, self.aux, leading = (np.array([number], np.int64) for number in (bias, aux, p.m))
        attribute, epilogue = lt.MatmulDescAttribute, lt.Epilogue
        told = {attribute.TRANSA: p.transpose_a, attribute.TRANSB: p.transpose_b}
        told[attribute.EPILOGUE] = {
            "": epilogue.BIAS if p.bias else epilogue.DEFAULT,
            "gelu": epilogue.GELU_AUX_BIAS if p.bias else epilogue.GELU_AUX,
            "dgelu": epilogue.DGELU,
            "sums": epilogue.BGRADA,
        }[p.epilogue]
        self.scales = np.array([0, 0], np.uint64)
        if scales:
            self.scale(lt, scales)
        if bias:
            lt.matmul_desc_set_attribute(self.desc, attribute.BIAS_POINTER, self.bias.ctypes.data, 8)
        if aux:  # of the dtype of d, as the library takes it if it is not told
            lt.matmul_desc_set_attribute(self.desc, attribute.EPILOGUE_AUX_POINTER, self.aux.ctypes.data, 8)
            lt.matmul_desc_set_attribute(self.desc, attribute.EPILOGUE_AUX_LD, leading.ctypes.data, 8)
        for name, value in told.items():
            number = ctypes.c_int32(value)
            lt.matmul_desc_set_attribute(self.desc, name, ctypes.addressof(number), 4)

        def layout(name: str, rows: int, columns: int, transposed: bool, leading: int) -> int:
            shape = (columns, rows) if transposed else (rows, columns)
            made: int = lt.matrix_layout_create(TYPES[name], *shape, leading)
            return made

        self.a = layout(p.dtype, p.m, p.k, p.transpose_a, p.lda)
        self.b = layout(p.dtype_b or p.dtype, p.k, p.n, p.transpose_b, p.ldb)
        self.d = layout(p.out, p.m, p.n, False, p.ldd)

    def scale(self, lt: Any, scales: Sequence[int]) -> None:
        """What a and b are multiplied by lies at these addresses."""
        self.scales[:] = scales
        names = lt.MatmulDescAttribute.A_SCALE_POINTER, lt.MatmulDescAttribute.B_SCALE_POINTER
        for i, name in enumerate(names):
            lt.matmul_desc_set_attribute(self.desc, name, self.scales.ctypes.data + 8 * i, 8)
