"""What the tests of CUDA kernels share, on the CPU and on a GPU: arguments, tolerances, and sizes at which something
changes: rows of more than registers hold, packs that are not whole, several tiles of a row, several partial sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hpcmp import kernels
from hpcmp.arrays import Array, dtype_of, is_half
from hpcmp.kernels import cuda, reference, update
from hpcmp.kernels.half import ROUNDED
from hpcmp.random import DropoutMask
from tests.kernels.test_half import IN_PLACE, cast
from tests.kernels.test_kernels import CALLS, Sizes, run

#: Kernels that round in between: the probabilities, or the product that a second kernel goes on with.
ROUNDED_BETWEEN = {"attention", "attention_backward", "matmul_gelu", "matmul_gelu_backward"}
HALF_ULP = {"float32": 0.0, "float64": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
DTYPES = [dtype_of(name) for name in HALF_ULP]

#: The kernels that are written in CUDA, each with the dtypes that it is for: optimizers work on master weights.
KERNELS = [
    (name, dtype)
    for name in CALLS
    if name in cuda.NATIVE
    for dtype in DTYPES
    if not (is_half(dtype) and hasattr(update, name))
]

Real = Callable[..., Array]  # (*shape) -> normally distributed numbers


def _norm(rows: int, n: int, backward: bool, rms: bool, onto: bool = False) -> Callable[[Real], list[Any]]:
    def make(real: Real) -> list[Any]:
        x, w, b = real(rows, n), real(n), real(n)
        if not backward:
            return [x, w, 1e-5] if rms else [x, w, b, 1e-5]
        statistics = reference.rms_norm(x, w, 1e-5)[1:] if rms else reference.layer_norm(x, w, b, 1e-5)[1:]
        return [real(rows, n), x, w, *statistics, reference._means, *([real(rows, n)] if onto else [])]

    return make


def _norm_weight(rows: int, n: int, rms: bool) -> Callable[[Real], list[Any]]:
    def make(real: Real) -> list[Any]:
        dy, x, _, *statistics, _ = _norm(rows, n, True, rms)(real)
        return [dy, x, *statistics]

    return make


def _dropout(rows: tuple[int, ...], runs: tuple[slice, ...], extra: bool = False) -> Callable[[Real], list[Any]]:
    def make(real: Real) -> list[Any]:
        *first, last = rows
        i, j = np.arange(last) + 2**31, np.arange(3, 3 + first[-1])[:, None] if first else np.array(7)
        e = np.arange(first[0])[:, None, None] * 5 if extra else 9
        return [real(*rows, sum(run.stop - run.start for run in runs)), DropoutMask(0.4, (5, 2**31), i, j, runs, e)]

    return make


def _rope(n: int, half: int) -> Callable[[Real], list[Any]]:
    return lambda real: [real(3, 2, 5, n), real(3, 1, 1, half), real(3, 1, 1, half)]


#: (kernel, its arguments) by name. Those of 16 bits are rounded from these.
CASES: dict[str, tuple[str, Callable[[Real], list[Any]]]] = {
    **{f"rms_norm {n}": ("rms_norm", _norm(5, n, False, True)) for n in (1, 31, 64, 200, 1032, 4104, 20001)},
    **{f"layer_norm {n}": ("layer_norm", _norm(9, n, False, False)) for n in (8, 33, 520, 2056, 9001, 33000)},
    **{
        f"rms_norm_backward {n}": ("rms_norm_backward", _norm(5, n, True, True, n % 8 == 0))
        for n in (1, 31, 64, 200, 1032, 4104, 20001)
    },
    **{
        f"layer_norm_backward {n}": ("layer_norm_backward", _norm(9, n, True, False, n % 8 == 0))
        for n in (8, 33, 520, 2056, 9001, 33000)
    },
    **{
        f"{kind}_backward_weight {n}": (f"{kind}_backward_weight", _norm_weight(rows, n, kind == "rms_norm"))
        for kind in ("rms_norm", "layer_norm")
        for rows, n in ((700, 33), (131, 512), (2, 1030))
    },
    **{f"add_rows {n}": ("add_rows", lambda real, n=n: [real(n), real(3, 211, n)]) for n in (1, 64, 777)},
    "gelu": ("gelu", lambda real: [real(70001) * 3]),
    "gelu_backward": ("gelu_backward", lambda real: [real(70001), real(70001) * 3]),
    "add": ("add", lambda real: [real(300, 257), real(300, 257)]),
    "swiglu": ("swiglu", lambda real: [real(5, 2, 5000)]),
    "swiglu_backward": ("swiglu_backward", lambda real: [real(3, 5001), real(3, 2, 5001)]),
    "swiglu, short rows": ("swiglu", lambda real: [real(300, 2, 24)]),
    "swiglu_backward, short rows": ("swiglu_backward", lambda real: [real(300, 24), real(300, 2, 24)]),
    "assign": ("assign", lambda real: [real(70003), real(70003)]),
    "square_sum": ("square_sum", lambda real: [real(3000001)]),
    "add_square_sum": ("add_square_sum", lambda real: [np.full(1, 2.5), real(200003)]),
    "dropout": ("dropout", _dropout((4, 70), (slice(0, 640),))),
    "dropout from an odd column": ("dropout", _dropout((4, 7), (slice(13, 50),))),
    "dropout of two runs": ("dropout", _dropout((3, 4, 7), (slice(4, 24), slice(40, 61)), extra=True)),
    "dropout of one row": ("dropout", _dropout((3,), (slice(8, 4000),))),
    "rope of all": ("rope", _rope(64, 32)),
    "rope of a half": ("rope", _rope(256, 64)),
    "rope of odd sizes": ("rope", _rope(29, 11)),
}


def case(name: str, dtype: Any, seed: int | None = None) -> tuple[str, list[Any]]:
    """The kernel, and its arguments in a dtype; without a seed, others in every run."""
    rng = np.random.default_rng(seed)
    kernel, make = CASES[name]
    wide = np.float64 if dtype == np.float64 else np.float32
    arguments = make(lambda *shape: rng.normal(size=shape).astype(wide))
    targets = IN_PLACE.get(kernel, 0)
    return kernel, arguments[:targets] + cast(arguments[targets:], dtype) if is_half(dtype) else arguments


def arguments_of(name: str, sizes: tuple[int, int], dtype: Any) -> list[Any]:
    """A kernel's arguments in a dtype; of 16 bits, with a target in float32."""
    if not is_half(dtype):
        return CALLS[name](Sizes(*sizes, dtype))
    arguments = CALLS[name](Sizes(*sizes, np.float32))
    targets = IN_PLACE.get(name, 0)
    return arguments[:targets] + cast(arguments[targets:], dtype)


def expected_of(name: str, arguments: list[Any]) -> list[Array]:
    """What the reference makes of them in double precision: results, then the arguments as it leaves them."""
    return run(kernels.REFERENCE, name, [v.astype(np.float64) if is_float(v) else v for v in arguments])


def kernel_set(dtype: Any) -> Any:
    return kernels.CUDA_HALF if is_half(dtype) else kernels.CUDA


def is_float(x: Any) -> bool:
    return isinstance(x, np.ndarray) and (x.dtype.kind == "f" or is_half(x.dtype))


def check(name: str, found: list[Array], expected: list[Array], dtype: Any) -> None:
    """Equal but for rounding: once, to nearest, in results of 16 bits."""
    for y, z in zip(found, expected, strict=True):
        assert np.shape(y) == np.shape(z)
        kind = y.dtype.name if is_float(y) else "float64"
        scale = np.abs(z).max(initial=1, where=np.isfinite(z))
        atol = scale * (1e-12 if dtype == np.float64 else 2e-5)
        if name in ROUNDED_BETWEEN:
            atol += 3 * HALF_ULP[dtype.name] * scale
        y = y.astype(np.float64) if is_float(y) else y
        np.testing.assert_allclose(y, z, rtol=1.01 * HALF_ULP[kind], atol=atol, err_msg=name)


def check_dtypes(name: str, results: list[Array], dtype: Any) -> None:
    """The first 16-bit argument's, or float32 where ``ROUNDED`` says so."""
    for i, y in enumerate(results):
        if is_float(y):
            rounded = not is_half(dtype) or i in ROUNDED.get(name, range(9))
            assert y.dtype == (dtype if rounded else np.float32)
