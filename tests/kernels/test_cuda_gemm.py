"""Matrix products for GPUs over an interpreter of cuBLASLt's descriptors, and of cuBLAS's calls, on NumPy arrays."""

from __future__ import annotations

import ctypes
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from hpcmp.arrays import dtype_of
from hpcmp.errors import InputError
from hpcmp.kernels import reference
from hpcmp.kernels.cuda import gemm, lt, multiply
from hpcmp.kernels.cuda.choices import Choices
from hpcmp.kernels.cuda.product import product
from tests.kernels.cublaslt import DTYPES, CublasLt, make_lt, multiplying
from tests.kernels.test_kernels import CALLS, SIZES, Sizes

RNG = np.random.default_rng
HALVES = dtype_of("bfloat16"), dtype_of("float16")
ALL = (*HALVES, np.dtype("float32"), np.dtype("float64"))
EPSILON = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 2**-20, "float64": 2**-48}


@pytest.fixture
def library() -> Iterator[CublasLt]:
    """cuBLASLt, and nothing else, makes all products."""
    with multiplying(make_lt(CublasLt())) as binding:
        yield binding


#: How a matrix may lie, as a view of something larger whose other numbers are NaN.
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rows": lambda x: inside(x, (0, 0), (0, 0)),
    "columns": lambda x: inside(x.T, (0, 0), (0, 0)).T,
    "slice of columns": lambda x: inside(x, (0, 0), (8, 24)),
    "slice of rows": lambda x: inside(x, (3, 2), (0, 0)),
    "odd place": lambda x: inside(x, (1, 1), (3, 2)),
    "turned slice": lambda x: inside(x.T, (1, 2), (5, 1)).T,
}
COPIED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "every second": lambda x: np.repeat(np.repeat(x, 2, 1), 2, 0)[::2, ::2],
    "backwards": lambda x: np.ascontiguousarray(x[::-1])[::-1],
    "repeated row": lambda x: np.broadcast_to(x[:1], x.shape),
    "overlapping rows": lambda x: sliding_window_view(x.reshape(-1)[: sum(x.shape) - 1], x.shape[1]),
}


def inside(x: np.ndarray, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
    wide = np.full((sum(rows) + len(x), sum(columns) + x.shape[1]), np.nan, x.dtype)
    view = wide[rows[0] : rows[0] + len(x), columns[0] : columns[0] + x.shape[1]]
    view[...] = x
    return view


def close(found: np.ndarray, expected: np.ndarray, terms: int) -> None:
    tolerance = EPSILON[found.dtype.name] * max(1.0, float(np.abs(expected).max(initial=0)))
    if found.dtype.name == "float32":
        tolerance *= max(1, terms) ** 0.5
    np.testing.assert_allclose(found.astype(np.float64), expected, rtol=0, atol=tolerance)


def draw(seed: int, dtype: np.dtype[Any], *shape: int) -> np.ndarray:
    return RNG(seed).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("dtype", (HALVES[0], np.dtype("float64")), ids=str)
@pytest.mark.parametrize("second", [*LAYOUTS, "every second"])
@pytest.mark.parametrize("first", [*LAYOUTS, *COPIED])
def test_products_of_matrices_however_they_lie(
    library: CublasLt, first: str, second: str, dtype: np.dtype[Any]
) -> None:
    lay = LAYOUTS | COPIED
    for m, k, n in (5, 7, 3), (1, 4, 6), (6, 1, 1), (3, 8, 1):
        a, b, bias = lay[first](draw(1, dtype, m, k)), lay[second](draw(2, dtype, k, n)), draw(3, dtype, n)
        given = [x.tobytes() for x in (a, b, bias)]
        expected = a.astype(np.float64) @ b.astype(np.float64)
        close(gemm.matmul(a, b), expected, k)
        close(gemm.matmul(a, b, bias), expected + bias, k)
        close(gemm.matmul(a, b, inside(bias[None], (0, 0), (1, 0))[0]), expected + bias, k)
        close(gemm.matmul_transposed(a, lay[second](draw(2, dtype, k, n).T)), expected, k)
        assert given == [x.tobytes() for x in (a, b, bias)]


@pytest.mark.parametrize("dtype", (HALVES[1], np.dtype("float32")), ids=str)
@pytest.mark.parametrize("target", [*LAYOUTS, "every second"])
@pytest.mark.parametrize("source", LAYOUTS)
def test_gradients_are_added_to_however_they_lie(
    library: CublasLt, source: str, target: str, dtype: np.dtype[Any]
) -> None:
    """From 16 bits too, into float32, and what lies beside a slice is left alone."""
    wide = np.promote_types(dtype, np.float32)
    for t, i, o in (4, 5, 7), (1, 3, 2), (6, 1, 4):
        x, dy = LAYOUTS[source](draw(4, dtype, t, i)), LAYOUTS[source](draw(5, dtype, t, o))
        before = draw(6, wide, i, o)
        grad = (LAYOUTS | COPIED)[target](before)
        around = grad if grad.base is None else grad.base
        outside = np.isnan(around).sum()
        gemm.add_outer(grad, x, dy)
        close(grad, before + x.astype(np.float64).T @ dy.astype(np.float64), t)
        assert np.isnan(around).sum() == outside


def test_nothing_is_copied_that_cublas_can_address(library: CublasLt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiply, "_copied", lambda *arguments: pytest.fail("copied"))
    for first in LAYOUTS.values():
        for second in LAYOUTS.values():
            for out in LAYOUTS.values():
                a, b = first(draw(1, HALVES[0], 5, 7)), second(draw(2, HALVES[0], 7, 3))
                grad = out(np.ones((5, 3), np.float32))
                multiply.gemm(a, b, grad, accumulate=True)
                close(grad, 1 + a.astype(np.float64) @ b.astype(np.float64), 7)
    one = np.broadcast_to(np.float32(2), (1, 4))  # its steps from row to row and column to column are 0
    assert gemm.matmul(one[:, :1], np.ones((1, 5), np.float32)).tolist() == [[2.0] * 5]


def test_a_product_is_planned_once(library: CublasLt) -> None:
    w, bias = draw(1, np.dtype("float32"), 6, 4), draw(2, np.dtype("float32"), 4)
    made = []
    for i in range(3):
        x = draw(3 + i, np.dtype("float32"), 5, 2, 6)
        close(gemm.matmul(x, w, bias * i), x.astype(np.float64) @ w + bias * i, 6)
        made.append(len(library.things))
    assert made[1:] == made[:-1] and len(multiply._plans) <= 2  # two alignments of the bias at most


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["matmul", "matmul_transposed", "add_outer"])
def test_the_kernels_of_the_specification(library: CublasLt, name: str, size: tuple[int, int]) -> None:
    ours, theirs = CALLS[name](Sizes(*size, np.float32)), CALLS[name](Sizes(*size, np.float32))
    found, expected = getattr(gemm, name)(*ours), getattr(reference, name)(*theirs)
    for y, z in zip((found, *ours), (expected, *theirs), strict=True):
        if z is not None:
            np.testing.assert_allclose(y, z, rtol=0, atol=1e-5 * (1 + np.abs(z).max(initial=0)))


def test_sums_of_16_bits_are_rounded_once(library: CublasLt) -> None:
    """1000 ones and a bias of 4: in bfloat16 256 + 1 is 256, and 1000 + 4 is 1000, 1004 rounded is 1004."""
    ones, bias = np.ones((2, 1000), HALVES[0]), np.full(3, 4, HALVES[0])
    assert (gemm.matmul(ones, np.ones((1000, 3), HALVES[0]), bias) == 1004).all()
    grad = np.zeros((1, 1), np.float32)
    gemm.add_outer(grad, np.ones((1001, 1), HALVES[0]), np.ones((1001, 1), HALVES[0]))
    assert grad == 1001
    with pytest.raises(TypeError, match="add_outer: adding up in bfloat16"):
        gemm.add_outer(np.zeros((1, 1), HALVES[0]), ones, ones)


def test_a_bias_for_a_result_that_lies_in_columns(library: CublasLt) -> None:
    a, b, bias = draw(1, HALVES[0], 5, 7), draw(2, HALVES[0], 7, 3), draw(3, HALVES[0], 3)
    out = np.zeros((3, 5), HALVES[0]).T
    multiply.gemm(a, b, out, bias)
    close(out, a.astype(np.float64) @ b.astype(np.float64) + bias, 7)


def test_sizes_that_do_not_fit_are_refused(library: CublasLt) -> None:
    x = np.ones((3, 4), np.float32)
    assert (gemm.matmul(x, x.T.copy()) == 4).all()
    with pytest.raises(ValueError, match="no product of"):
        gemm.matmul(x, x)
    with pytest.raises(ValueError, match="no product of"):
        gemm.matmul(x, np.ones((3, 3), np.float32))  # but for its rows like the product before
    with pytest.raises(ValueError, match="no product of"):
        multiply.gemm(x, x.T, np.zeros((3, 4), np.float32))


def test_dtypes_that_differ_become_the_wider(library: CublasLt) -> None:
    x, w = draw(1, np.dtype("float32"), 3, 4), draw(2, HALVES[0], 4, 2)
    expected = x @ w.astype(np.float64) + draw(3, HALVES[0], 2)
    close(gemm.matmul(x, w, draw(3, HALVES[0], 2)), expected, 4)
    found = gemm.matmul(x.astype(HALVES[0]), w.astype(np.float32))  # the result has the dtype of the first
    close(found, x.astype(HALVES[0]).astype(np.float64) @ w.astype(np.float64), 4)
    assert found.dtype == HALVES[0]
    grad = np.zeros((4, 2), np.float32)
    gemm.add_outer(grad, x.astype(HALVES[0]), x[:, :2])
    close(grad, x.astype(HALVES[0]).astype(np.float64).T @ x[:, :2], 3)


def test_each_stream_has_its_workspace() -> None:
    binding, streams = CublasLt(), iter([3, 3, 5, 3, 5])
    made = lt.Lt(binding, lambda: next(streams), binding.alloc, lambda call: 1.0, "here", Choices())
    a = np.ones((2, 2))
    binding.lend(a)
    asked, _ = product(a, a, a, (a.ctypes.data,) * 3) or pytest.fail("not addressable")
    launch = made.plan(asked, 0)
    assert launch is not None
    for _ in range(5):
        launch(a.ctypes.data, a.ctypes.data, a.ctypes.data, 0)
    assert sorted(made.workspaces) == [3, 5]


def test_an_algorithm_without_success_is_not_taken(library: CublasLt) -> None:
    library.failed = {1, 2}
    assert (gemm.matmul(np.ones((3, 4)), np.ones((4, 2))) == 4).all() and library.used == [3]


def test_without_an_algorithm_the_bias_is_written_first(library: CublasLt) -> None:
    (known,) = multiply.planners()
    x, w, bias = draw(1, HALVES[0], 3, 4), draw(2, HALVES[0], 4, 2), draw(3, HALVES[0], 2)
    expected = x.astype(np.float64) @ w.astype(np.float64) + bias
    with mock.patch.object(multiply, "planners", lambda: (lambda p, bias: None if p.bias else known(p, bias),)):
        for _ in range(2):
            close(gemm.matmul(x, w, bias), expected, 4)
    library.algorithms = 0
    with pytest.raises(RuntimeError, match="neither cuBLASLt nor cuBLAS can compute Product"):
        gemm.matmul(w, x[:2])


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_without_nvmath_cublas_does_it(library: CublasLt, dtype: np.dtype[Any]) -> None:
    calls = []

    def gemm_ex(
        handle: int, transa: int, transb: int, m: int, n: int, k: int, alpha: int, a: int, atype: int, lda: int,
        b: int, btype: int, ldb: int, beta: int, c: int, ctype: int, ldc: int, compute: int, algo: int,
    ) -> None:  # fmt: skip
        assert handle == 11 and algo == -1 and compute == (70 if dtype == np.float64 else 68)
        calls.append((m, n, k))
        x, y = (
            library._matrix(at, library.matrix_layout_create(t, *(shape[::-1] if turned else shape), ld))
            for at, t, shape, ld, turned in ((a, atype, (m, k), lda, transa), (b, btype, (k, n), ldb, transb))
        )
        z = library._matrix(c, library.matrix_layout_create(ctype, m, n, ldc))
        wide = DTYPES[1 if compute == 70 else 0]
        factor = np.frombuffer(ctypes.string_at(beta, wide.itemsize), wide)[0]
        made = (x.T if transa else x).astype(wide) @ (y.T if transb else y).astype(wide)
        z[...] = (made + (factor * z.astype(wide) if factor else 0)).astype(z.dtype)

    cublas, device = SimpleNamespace(gemmEx=gemm_ex), SimpleNamespace(get_cublas_handle=lambda: 11)
    names = "cupy", "cupy.cuda", "cupy_backends", "cupy_backends.cuda", "cupy_backends.cuda.libs"
    modules = {name: SimpleNamespace(device=device, cublas=cublas) for name in names}
    wide = np.promote_types(dtype, np.float32)
    only_cublas = mock.patch.object(multiply, "planners", lambda: (multiply._cublas,))
    with mock.patch.dict(sys.modules, modules), only_cublas:
        for lay in LAYOUTS.values():
            x, w, bias = lay(draw(1, dtype, 5, 4)), lay(draw(2, dtype, 4, 3)), draw(3, dtype, 3)
            close(gemm.matmul(x, w, bias), x.astype(np.float64) @ w.astype(np.float64) + bias, 4)
            before = draw(4, wide, 5, 3)
            grad = lay(before)
            multiply.gemm(x, w, grad, accumulate=True)
            close(grad, before + x.astype(np.float64) @ w.astype(np.float64), 4)
    assert len(calls) == 2 * len(LAYOUTS)


def run_with(choices: Choices, seconds: Any = None, version: int = 130100, device: str = "here") -> list[int]:
    """The algorithms of a library that makes one product."""
    with multiplying(make_lt(CublasLt(version=version), choices, seconds, device)) as binding:
        gemm.matmul(np.ones((64, 16), np.float32), np.ones((16, 32), np.float32), np.ones(32, np.float32))
    return binding.used


def test_what_a_run_that_tunes_finds_counts_from_the_next_on(tmp_path: Path) -> None:
    file, count = tmp_path / "choices", iter(range(99))
    order = [5.0, 4.0, 2.0, 7.0, 1.5, 6.0, 3.0, 8.0]

    def seconds(call: Callable[[], None]) -> float:
        call()
        return order[next(count)]

    used = run_with(Choices(tune=file), seconds)
    assert used == [1, 2, 3, 4, 5, 6, 7, 8, 1]  # each is timed; the product itself is the first's
    (line,) = [json.loads(text) for text in file.read_text().splitlines()]
    assert (line["microseconds"], line["recommended"]) == (1.5e6, 5e6)
    later = Choices(read=file)
    for _ in range(2):
        assert run_with(later) == [5]
    assert run_with(later, version=130200) == [1]
    assert run_with(later, device="another") == [1]
    assert run_with(Choices(read=file, tune=file), pytest.fail) == [5]  # known: not timed again
    text = file.read_text()
    file.write_text(text.replace("05" * 64, "07" * 64) + text)
    assert run_with(Choices(read=file)) == [7]  # of two, the first
    file.write_text(text.replace("05" * 64, "63" * 64))
    assert run_with(Choices(read=file)) == [1]  # not one that the library accepts


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"product": {}}', '{"product": 3}', "\xff", "[" * 100000, '"device"', "null"]
)
def test_a_file_that_holds_no_choices_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "choices"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"HPCMP_GEMM_CHOICES: .*choices, line 1: not a choice"):
        Choices(read=file)
    with pytest.raises(InputError, match=r"HPCMP_GEMM_CHOICES: .*absent: No such file"):
        Choices(read=tmp_path / "absent")
    with pytest.raises(InputError, match=r"HPCMP_GEMM_TUNE: .*absent.choices: No such file"):
        Choices(tune=tmp_path / "absent" / "choices")


def test_the_binding_is_nvmaths() -> None:
    """Where nvmath-python is installed: the names, numbers and arguments of the interpreter are its own."""
    theirs = pytest.importorskip("nvmath.bindings.cublasLt")
    from nvmath import CudaDataType
    from nvmath.bindings import cublas

    ours = CublasLt()
    for kind in ("MatmulDescAttribute", "MatmulPreferenceAttribute", "Epilogue"):
        for member in getattr(ours, kind):
            assert getattr(theirs, kind)[member.name] == member.value
    functions = [n for n, f in vars(CublasLt).items() if inspect.isfunction(f) and n[0] != "_"]
    for name in set(functions) - {"lend", "alloc"}:
        arguments = list(inspect.signature(getattr(ours, name)).parameters)
        assert arguments == list(inspect.signature(getattr(theirs, name)).parameters), name
    assert theirs.matmul_heuristic_result_dtype.itemsize == lt._RESULT
    fields = theirs.matmul_heuristic_result_dtype.fields
    assert (fields["workspace_size"][1], fields["state"][1]) == (64, 72)
    assert theirs.ReductionScheme.COMPUTE_TYPE == lt._PARTIAL_SUMS and issubclass(theirs.cuBLASLtError, Exception)
    letters = {"float32": "32F", "float64": "64F", "float16": "16F", "bfloat16": "16BF"}
    letters |= {"float8_e4m3fn": "8F_E4M3", "float8_e5m2": "8F_E5M2"}
    assert {name: CudaDataType[f"CUDA_R_{n}"] for name, n in letters.items()} == lt.TYPES
    assert {name: cublas.ComputeType[f"COMPUTE_{letters[name]}"] for name in lt.COMPUTE} == lt.COMPUTE
