"""Products by every CBLAS that is here against np.matmul: strides, shapes, dtypes; threads; the choice among them."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmp import kernels
from hpcmp.comm.mesh import Mesh
from hpcmp.errors import InputError
from hpcmp.kernels import blas, cblas, threads
from hpcmp.process import cores, loaded
from hpcmp.process import threads as asked
from hpcmp.training.config import Config, Model, Train
from hpcmp.training.engine import Engine

SMALL = blas._SMALL
HERE = [name for name in cblas.LIBRARIES if cblas.find(name)]
RNG = np.random.default_rng


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Small products too are the library's, unless a test has it otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blas, "_SMALL", -1)
        yield
    blas._load.cache_clear()
    blas.select("auto")


@pytest.fixture(params=[*HERE, "numpy"])
def library(request: pytest.FixtureRequest) -> str:
    blas.select(request.param)
    return str(request.param)


#: How a matrix may lie in memory; each gives a view of the numbers of ``x``.
LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "rows": np.copy,
    "columns": lambda x: x.copy("F"),
    "slice of columns": lambda x: within(x, (0, 3))[:, 2:-1],
    "slice of rows": lambda x: within(x, (4, 0))[3:-1],
    "every other row": lambda x: np.repeat(x, 2, 0)[::2],
    "every other column": lambda x: np.repeat(x, 2, 1)[:, ::2],
    "backwards": lambda x: x[::-1].copy()[::-1],
    "transposed slice": lambda x: within(x.T, (0, 3))[:, 2:-1].T,
    "out of step": lambda x: packed(x),
}


def within(x: Any, more: tuple[int, int]) -> Any:
    """A larger matrix with ``x`` where the slices of ``LAYOUTS`` look; nan around it, so that reading there shows."""
    whole = np.full((x.shape[0] + more[0], x.shape[1] + more[1]), np.nan, x.dtype)
    top, left = (3 if more[0] else 0), (2 if more[1] else 0)
    whole[top : top + x.shape[0], left : left + x.shape[1]] = x
    return whole


def packed(x: Any) -> Any:
    """``x`` at odd addresses."""
    raw = np.zeros(x.nbytes + 1, np.uint8)
    view = raw[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


sizes = st.sampled_from([0, 1, 2, 3, 5, 17, 64])
layouts = st.sampled_from(sorted(LAYOUTS))


@given(
    name=st.sampled_from([*HERE, "numpy"]),
    shape=st.tuples(sizes, sizes, sizes),
    ways=st.tuples(layouts, layouts, layouts),
    dtype=st.sampled_from([np.float32, np.float64]),
    accumulate=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_any_strided_matrices(name: str, shape: Any, ways: Any, dtype: Any, accumulate: bool) -> None:
    blas.select(name)
    (m, k, n), rng = shape, RNG(0)
    a, b, before = (rng.normal(size=s).astype(dtype) for s in ((m, k), (k, n), (m, n)))
    x, y, out = (LAYOUTS[way](matrix) for way, matrix in zip(ways, (a, b, before), strict=True))
    assert blas.gemm(x, y, out, accumulate=accumulate) is out
    tolerance = 40 * np.finfo(dtype).eps
    expected = a.astype(np.float64) @ b + (before if accumulate else 0)
    np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)
    if base_is_larger(out):
        assert np.isnan(out.base).sum() == out.base.size - out.size  # nothing beside it was written


def base_is_larger(out: Any) -> bool:
    return out.base is not None and out.base.dtype == out.dtype and np.isnan(out.base).any()


def test_without_out(library: str) -> None:
    a, b = RNG(0).normal(size=(7, 5)), RNG(1).normal(size=(5, 3))
    np.testing.assert_allclose(blas.gemm(a, b), a @ b, rtol=1e-13)
    assert blas.gemm(a[:0], b).shape == (0, 3)
    assert not blas.gemm(a[:, :0], b[:0]).any()
    with pytest.raises(TypeError, match="accumulate needs out"):
        blas.gemm(a, b, accumulate=True)


@pytest.mark.parametrize("dtypes", [("f4", "f8"), ("i4", "i4"), ("f2", "f2"), (">f8", ">f8"), ("c16", "c16")])
def test_other_dtypes_are_numpys(library: str, dtypes: tuple[str, str]) -> None:
    a, b = (np.arange(6).reshape(s).astype(d) for s, d in zip(((2, 3), (3, 2)), dtypes, strict=True))
    y = blas.gemm(a, b)
    assert y.dtype == (a @ b).dtype
    np.testing.assert_array_equal(y, [[10, 13], [28, 40]])
    np.testing.assert_array_equal(blas.gemm(a, b, y, accumulate=True), [[20, 26], [56, 80]])


def test_wrong_shapes_are_refused(library: str) -> None:
    a = np.ones((3, 4))
    for b, out in ((np.ones((3, 4)), None), (np.ones((4, 2)), np.ones((3, 3))), (np.ones((2, 4, 4)), np.ones((3, 4)))):
        with pytest.raises(ValueError):
            blas.gemm(a, b, out)
    frozen = np.ones((3, 3))
    frozen.flags.writeable = False
    for accumulate in (False, True):
        with pytest.raises(ValueError, match="read-only|readonly"):
            blas.gemm(a, a.T, frozen, accumulate=accumulate)


def test_an_output_that_overlaps_an_input(library: str) -> None:
    a = RNG(0).normal(size=(6, 6))
    expected = a + a @ a
    np.testing.assert_allclose(blas.gemm(a, a, a, accumulate=True), expected, rtol=1e-13)


def test_broadcast_and_overlapping_lines(library: str) -> None:
    row = np.broadcast_to(np.arange(4.0), (3, 4))
    windows = np.lib.stride_tricks.sliding_window_view(np.arange(6.0), 4)
    for a in (row, windows):
        out = np.ones((3, 3))
        np.testing.assert_array_equal(blas.gemm(a, windows.T, out, accumulate=True), 1 + a.copy() @ windows.T.copy())


@pytest.mark.skipif("openblas" not in HERE, reason="no OpenBLAS here")
def test_the_library_is_called_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    blas.select("openblas")
    whole = np.zeros((8, 9), np.float32)
    x = np.ones((6, 5), np.float32)
    monkeypatch.setattr(np, "matmul", None)
    for grad in (np.zeros(5 * 4, np.float32).reshape(5, 4), whole[:5, 2:6], whole.T[:5, 2:6]):
        kernels.CPU.add_outer(grad, x[:, :5], x[:, 1:5])
    assert whole.sum() == 2 * 6 * 20


def test_small_products_are_numpys(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call through ctypes costs more than they do."""
    monkeypatch.setattr(blas, "_SMALL", SMALL)
    monkeypatch.setattr(blas, "_call", None)
    out = np.ones((3, 5))
    assert blas.gemm(np.ones((3, 4)), np.ones((4, 5)), out, accumulate=True) is out
    assert (out == 5).all()
    if library != "numpy":
        with pytest.raises(TypeError):
            blas.gemm(np.ones((300, 4)), np.ones((4, 500)), np.ones((300, 500)), accumulate=True)


def test_the_gradient_is_added_where_it_lies(library: str) -> None:
    bucket = np.ones(4 + 15 + 2, np.float32)
    x, dy = RNG(0).normal(size=(4, 2, 3)).astype("f4"), RNG(1).normal(size=(4, 2, 5)).astype("f4")
    kernels.CPU.add_outer(bucket[4:19].reshape(3, 5), x, dy)
    np.testing.assert_allclose(bucket[4:19].reshape(3, 5), 1 + np.einsum("sbi,sbo->io", x, dy), rtol=1e-5)
    assert (bucket[:4] == 1).all() and (bucket[19:] == 1).all()


@pytest.mark.parametrize("shape", [(64, 64, 64), (33, 77, 129), (1, 300, 40), (300, 128, 7), (256, 512, 512)])
def test_bits_do_not_depend_on_where_arrays_lie(library: str, shape: tuple[int, int, int]) -> None:
    (m, k, n), rng, found = shape, RNG(0), set()
    a, b, c = (rng.normal(size=s).astype(np.float32) for s in ((m, k), (k, n), (m, n)))
    for i, j in ((0, 0), (4, 1), (1, 4), (8, 12), (15, 3)):
        out = at(c, j)
        found.add(blas.gemm(at(a, i), at(b, j), out, accumulate=True).tobytes())
    assert len(found) == 1


def at(x: Any, offset: int) -> Any:
    """A copy of ``x`` that begins ``offset`` numbers after a multiple of 64 bytes."""
    room = np.empty(x.size + 32, x.dtype)
    start = -room.ctypes.data % 64 // x.itemsize + offset
    room[start : start + x.size] = x.reshape(-1)
    return room[start : start + x.size].reshape(x.shape)


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three, however small the product."""
    monkeypatch.setattr(blas, "_WORTH", 1)
    monkeypatch.setattr(threads, "count", lambda: 3)


@pytest.mark.usefixtures("three_threads")
def test_threads(library: str) -> None:
    """Blocks of any strided matrices, and of fewer rows and columns than there are threads."""
    for (m, k, n), way in itertools.product([(37, 20, 41), (64, 5, 2), (1, 9, 50), (2, 3, 2), (1, 1, 1)], LAYOUTS):
        rng = RNG(m)
        x, y, out = (LAYOUTS[way](rng.normal(size=s)) for s in ((m, k), (k, n), (m, n)))
        expected = out + x @ y
        assert blas.gemm(x, y, out, accumulate=True) is out
        np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(blas.gemm(x, y), x @ y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 16])
@pytest.mark.parametrize("shape", [(2048, 256), (256, 2048), (1, 9), (3, 3), (17, 1)])
def test_blocks_cover_the_output_once(shape: tuple[int, int], count: int) -> None:
    covered = np.zeros(shape, int)
    blocks = blas._blocks(*shape, count)
    assert 1 <= len(blocks) <= count
    for rows, columns in blocks:
        assert covered[rows, columns].size
        covered[rows, columns] += 1
    assert (covered == 1).all()


THREADS = """
import sys
from hpcmp.kernels import blas, cblas, threads
blas.select(sys.argv[1])
numpys = cblas.find("openblas")._function("openblas_get_num_threads")()
print(threads.count(), blas.current()._dll.MKL_Get_Max_Threads() if sys.argv[1] == "mkl" else numpys, numpys)
"""


@pytest.mark.skipif("openblas" not in HERE, reason="no OpenBLAS here")
@pytest.mark.parametrize("name", [*HERE, "numpy"])
def test_threads_are_those_of_the_environment(name: str) -> None:
    """A library has one in each call; np.matmul, where it makes all products, has as many as there are."""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    for more, n in (({}, len(cores())), ({"OMP_NUM_THREADS": "2,1"}, 2), ({"OMP_NUM_THREADS": "1"}, 1)):
        argv = [sys.executable, "-c", THREADS, name]
        done = subprocess.run(argv, env=environment | more, capture_output=True, text=True, timeout=60, check=True)
        each = n if name == "numpy" else 1
        assert done.stdout.split() == [str(n), str(each), str(each)]


def test_the_environment_says_how_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert asked() == len(cores())
    for value, n in (("3", 3), ("3,2", 3), ("many", len(cores())), ("0", len(cores())), ("", len(cores()))):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert asked() == n


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in HERE:
        monkeypatch.setenv("HPCMP_BLAS", name)
        blas._load.cache_clear()
        blas.select("auto")
        assert blas.current() is cblas.find(name)
        blas.select("numpy")  # what a configuration says goes before the variable
        assert blas.current() is None
    monkeypatch.delenv("HPCMP_BLAS", raising=False)
    for intel in (True, False):
        monkeypatch.setattr(blas, "is_intel", lambda intel=intel: intel)
        blas._load.cache_clear()
        blas.select("auto")
        order = (["mkl"] if intel else []) + ["openblas", "blis"]
        assert blas.current() is next((cblas.find(name) for name in order if name in HERE), None)


def test_a_wrong_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    before = blas.current()
    monkeypatch.delenv("HPCMP_BLAS", raising=False)
    monkeypatch.setattr(blas, "find", lambda name: None)
    blas._load.cache_clear()
    with pytest.raises(InputError, match=r'train.blas = "mkl": .*pip install "hpcmp\[mkl\]"'):
        blas.select("mkl")
    blas.select("auto")
    assert blas.current() is None and blas.address(np.float32) is None  # no library at all: NumPy alone
    for value, message in (("blis", "HPCMP_BLAS=blis: there is no"), ("fast", "HPCMP_BLAS=fast: expected auto, mkl")):
        monkeypatch.setenv("HPCMP_BLAS", value)
        blas._load.cache_clear()
        with pytest.raises(InputError, match=message):
            blas.select("auto")
    monkeypatch.undo()
    blas._load.cache_clear()
    assert blas.current() is before


def test_a_configuration_chooses() -> None:
    config = Config(model=Model(layers=1, hidden=8, heads=2, sequence=4), train=Train(blas="numpy"))
    with Mesh() as mesh:
        Engine(config.resolved(ranks=1, vocabulary=5), mesh)
    assert blas.current() is None


def test_a_file_that_is_no_cblas_is_passed_over(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.so").write_bytes(b"no library")
    libc = loaded(r"libc[.-].*")
    places = [str(tmp_path / "broken.so"), *map(str, libc), str(tmp_path / "missing.so")]
    monkeypatch.setattr(cblas, "_candidates", lambda name: iter(places))
    cblas.find.cache_clear()
    try:
        assert cblas.find("blis") is None
    finally:
        cblas.find.cache_clear()


def test_the_kernels_address(library: str) -> None:
    here = blas.current()
    for dtype in (np.float32, np.float64):
        assert (blas.address(dtype) is None) == (here is None)
    assert blas.address(np.float16) is None
