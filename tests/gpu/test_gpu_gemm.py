"""Matrix products on a GPU, by cuBLASLt and by cuBLAS: of matrices however they lie, in a graph, tuned."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from hpcmp.arrays import dtype_of, to_host
from hpcmp.kernels import reference
from hpcmp.kernels.cuda import epilogue, gemm, multiply
from hpcmp.kernels.cuda.choices import Choices
from hpcmp.kernels.cuda.lt import Lt
from tests.kernels import test_cuda_epilogue
from tests.kernels.test_cuda_gemm import ALL, COPIED, LAYOUTS, close, draw

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

WAYS = ["cublasLt", "cublas"]


def put(view: np.ndarray[Any, Any]) -> Any:
    """A view on the GPU, of a copy of what it is a view of there, with its strides and its place."""
    import cupy

    base: Any = view
    while isinstance(base.base, np.ndarray):
        base = base.base
    low = np.lib.array_utils.byte_bounds(base)[0]
    whole = cupy.asarray(np.frombuffer(base.tobytes("A"), np.uint8))
    place = view.__array_interface__["data"][0] - low
    return cupy.ndarray(view.shape, view.dtype, whole.data + place, view.strides)


def make_lt(choices: Choices) -> Lt:
    import cupy

    binding = pytest.importorskip("nvmath.bindings.cublasLt")
    stream = cupy.cuda.get_current_stream
    return Lt(binding, lambda: stream().ptr, cupy.cuda.alloc, multiply._seconds, "this one", choices)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    only = [] if request.param == "cublas" else [make_lt(Choices()).plan]
    with using(*only, multiply._cublas):
        yield request.param


def using(*planners: Any) -> Any:
    """Products are planned by these, anew."""
    return mock.patch.multiple(multiply, planners=lambda: planners, _plans={})


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", [*LAYOUTS, "every second", "backwards", "repeated row"])
def test_products_of_matrices_however_they_lie(way: str, first: str, second: str, dtype: Any) -> None:
    lay = LAYOUTS | COPIED
    for m, k, n in (128, 64, 96), (5, 7, 3), (1, 4, 6), (6, 1, 1), (33, 130, 1):
        a, b, bias = lay[first](draw(1, dtype, m, k)), lay[second](draw(2, dtype, k, n)), draw(3, dtype, n)
        expected = a.astype(np.float64) @ b.astype(np.float64)
        close(to_host(gemm.matmul(put(a), put(b))), expected, k)
        close(to_host(gemm.matmul(put(a), put(b), put(bias))), expected + bias, k)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("target", [*LAYOUTS, "every second"])
@pytest.mark.parametrize("source", LAYOUTS)
def test_gradients_are_added_to_however_they_lie(way: str, source: str, target: str, dtype: Any) -> None:
    wide = np.promote_types(dtype, np.float32)
    for t, i, o in (64, 128, 96), (4, 5, 7), (6, 1, 4):
        x, dy = LAYOUTS[source](draw(4, dtype, t, i)), LAYOUTS[source](draw(5, dtype, t, o))
        before = draw(6, wide, i, o)
        grad = put((LAYOUTS | COPIED)[target](before))
        gemm.add_outer(grad, put(x), put(dy))
        close(to_host(grad), before + x.astype(np.float64).T @ dy.astype(np.float64), t)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("lay", LAYOUTS)
@pytest.mark.parametrize("name", test_cuda_epilogue.NAMES)
def test_products_with_epilogues(way: str, name: str, lay: str, dtype: Any) -> None:
    """The two GELUs, the bias and its gradient; of sizes that have none, too."""
    for sizes in (64, 128, 96), (5, 16, 8), (33, 40, 24), (5, 7, 3), (2, 8, 8):
        test_cuda_epilogue.check(name, test_cuda_epilogue.arguments(name, *sizes, dtype, LAYOUTS[lay]), put)


@pytest.mark.parametrize("dtype", test_cuda_epilogue.HALVES, ids=str)
@pytest.mark.parametrize("name", test_cuda_epilogue.NAMES)
def test_cublaslt_has_the_epilogues(name: str, dtype: Any) -> None:
    """No kernel follows the product."""
    given = test_cuda_epilogue.arguments(name, 512, 1024, 256, dtype)
    used = ("gelu", "gelu_backward", "_bias_gelu", "add_rows")
    fail = {each: lambda *arguments: pytest.fail("not fused") for each in used}
    with using(make_lt(Choices()).plan), mock.patch.multiple(epilogue, **fail):
        test_cuda_epilogue.check(name, given, put)


def test_cublaslts_gelu_is_the_tanh_form() -> None:
    """Not that of the error function: of the difference of the two, up to 5e-4, its results hold nothing."""
    x = np.linspace(-5, -0.5, 8192).reshape(1024, 8).astype("float16")  # where the result is small, and so exact
    with using(make_lt(Choices()).plan), mock.patch.object(epilogue, "gelu", lambda x: pytest.fail("not fused")):
        y, z = epilogue.matmul_gelu(put(x), put(np.eye(8).astype("float16")))
    wide = x.astype(np.float64)
    np.testing.assert_array_equal(to_host(z), x)
    apart = wide / 2 * (1 + np.vectorize(math.erf)(wide / 2**0.5)) - reference.gelu(wide)
    assert abs(((to_host(y) - reference.gelu(wide)) * apart).sum() / (apart * apart).sum()) < 0.3


def test_the_same_bits_in_every_call(way: str) -> None:
    import cupy

    dtype = dtype_of("bfloat16")
    x, w = put(draw(1, dtype, 512, 4096)), put(draw(2, dtype, 4096, 256))
    grads = [cupy.zeros((4096, 256), np.float32) for _ in range(5)]
    for grad in grads:
        gemm.add_outer(grad, x, gemm.matmul(x, w))
    assert all((grad == grads[0]).all() for grad in grads)


def test_in_a_graph() -> None:
    import cupy

    dtype = dtype_of("bfloat16")
    with using(make_lt(Choices()).plan):
        a, b, bias = put(draw(1, dtype, 256, 512)), put(draw(2, dtype, 512, 128)), put(draw(3, dtype, 128))
        one = cupy.eye(128, dtype=dtype)
        out, grad, bias_grad = cupy.zeros((256, 128), dtype), cupy.zeros((512, 128), np.float32), cupy.zeros(128, "f4")

        def work() -> None:
            multiply.gemm(a, b, out, bias)
            active, z = epilogue.matmul_gelu(a, b, bias)
            out[...] += active + epilogue.matmul_gelu_backward(out, one, z)
            epilogue.add_outer_and_rows(grad, bias_grad, a, out)

        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            work()
            expected = to_host(out), to_host(grad), to_host(bias_grad)
            stream.begin_capture()
            work()
            graph = stream.end_capture()
            out[...], grad[...], bias_grad[...] = 0, 0, 0
            graph.launch(stream)
            stream.synchronize()
        np.testing.assert_array_equal(to_host(out), expected[0])
        np.testing.assert_array_equal(to_host(grad), expected[1])
        np.testing.assert_array_equal(to_host(bias_grad), expected[2])


def test_a_choice_is_taken_by_the_next_run(tmp_path: Path) -> None:
    file, dtype = tmp_path / "choices", dtype_of("bfloat16")
    a, b = put(draw(1, dtype, 1024, 1024)), put(draw(2, dtype, 1024, 1024))
    results = []
    for choices in (Choices(), Choices(tune=file)):
        with using(make_lt(choices).plan):
            results.append(to_host(gemm.matmul(a, b)))
    np.testing.assert_array_equal(*results)  # a run that tunes computes as any other does
    (line,) = map(json.loads, file.read_text().splitlines())
    assert 0 < line["microseconds"] <= line["recommended"] < 1e4
    lt = make_lt(Choices(read=file))
    with mock.patch.object(lt, "_candidates", lambda *asked: pytest.fail("not taken")), using(lt.plan):
        close(to_host(gemm.matmul(a, b)), to_host(a).astype(np.float64) @ to_host(b).astype(np.float64), 1024)
