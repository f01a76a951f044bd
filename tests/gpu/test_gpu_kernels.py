"""Every kernel, and the random numbers, on CuPy arrays against NumPy's, on odd and empty sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcmp import kernels, random
from hpcmp.arrays import is_half, to_host
from hpcmp.kernels import update
from hpcmp.kernels.cuda import launch
from hpcmp.kernels.half import OVERWRITTEN
from tests.kernels.cuda_cases import CASES, DTYPES, arguments_of, case, check, check_dtypes, expected_of
from tests.kernels.test_kernels import CALLS, SETTINGS, SIZES

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def put(x: Any, contiguous: bool) -> Any:
    """An array's copy on the GPU; if not contiguous, every second number of one with its axes in the opposite order."""
    import cupy

    if not isinstance(x, np.ndarray):
        return x
    y = cupy.asarray(x)
    return y if contiguous else cupy.repeat(y.T, 2, 0)[::2].T


def compare(name: str, arguments: list[Any], dtype: Any, contiguous: bool = True) -> None:
    """A kernel, on CuPy arrays, against the reference in double precision on the host."""
    import cupy

    expected = expected_of(name, arguments)
    given = [put(v, contiguous) for v in arguments]
    result = getattr(kernels.of(cupy.empty(0, dtype)), name)(*given, **SETTINGS.get(name, {}))
    results = list(result) if isinstance(result, tuple) else [] if result is None else [result]
    if name in OVERWRITTEN:
        assert results[0] is given[OVERWRITTEN[name]]
    found = [*results, *(v for v in given if isinstance(v, cupy.ndarray))]
    results = [to_host(v) if isinstance(v, cupy.ndarray) else v for v in results]
    check_dtypes(name, results, dtype)
    check(name, [to_host(v) if isinstance(v, cupy.ndarray) else v for v in found], expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CALLS)
def test_every_kernel_does_as_the_reference_does_on_the_host(
    name: str, size: tuple[int, int], contiguous: bool, dtype: Any
) -> None:
    if is_half(dtype) and hasattr(update, name):
        pytest.skip("optimizers work on master weights")
    compare(name, arguments_of(name, size, dtype), dtype, contiguous)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_where_something_changes(name: str, dtype: Any) -> None:
    """On other numbers in every run: ``seed`` in a failure's report is what they come from."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    kernel, arguments = case(name, dtype, seed)
    compare(kernel, arguments, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_bits_are_the_same_in_every_run(name: str, dtype: Any) -> None:
    import cupy

    kernel, arguments = case(name, dtype, 0)
    found = []
    for _ in range(3):
        given = [put(v, True) for v in arguments]
        result = getattr(kernels.of(cupy.empty(0, dtype)), kernel)(*given)
        results = result if isinstance(result, tuple) else () if result is None else (result,)
        found.append([to_host(v) if isinstance(v, cupy.ndarray) else np.array(v) for v in (*results, *given[:1])])
    for again in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], again, strict=True))


@pytest.mark.parametrize("source", launch.INSTANCES)
def test_every_instance_compiles(source: str) -> None:
    """By NVRTC, for this GPU."""
    made = launch.Cupy().compile(source, tuple(launch.expressions(source)))
    assert all(kernel.max_threads_per_block >= 32 for kernel in made.values())


def test_random_numbers_are_the_hosts() -> None:
    import cupy

    key = random.key(3, "a/name", 7)
    for shape in ((3, 4, 9), (2, 1, 1), (5, 70000)):
        for index in (tuple(slice(0, n) for n in shape), tuple(slice(n // 3, n) for n in shape)):
            found = random.normal_slab(key, shape, index, cupy)
            np.testing.assert_allclose(to_host(found), random.normal_slab(key, shape, index), atol=1e-12)
    i, j = np.arange(5)[:, None], np.array([2**31, 7])
    words = random.bits(key, cupy.asarray(i), cupy.asarray(j), slice(3, 11), xp=cupy)
    np.testing.assert_array_equal(to_host(words), random.bits(key, i, j, slice(3, 11)))
    runs = slice(0, 6), slice(9, 10)
    kept = random.DropoutMask(0.3, key, cupy.asarray(i), cupy.asarray(j), runs, cupy.asarray(i)).keep(cupy)
    np.testing.assert_array_equal(to_host(kept), random.DropoutMask(0.3, key, i, j, runs, i).keep())


def test_the_gradient_of_an_embedding_is_the_same_in_every_run() -> None:
    """Many tokens to a row, and numbers of very different sizes, whose sum depends on the order."""
    import cupy

    draw = np.random.default_rng(0)
    ids, dy = draw.integers(0, 3, 20000), (10.0 ** draw.uniform(-6, 6, (20000, 8))).astype(np.float32)
    found = []
    for _ in range(5):
        grad = cupy.zeros((3, 8), np.float32)
        kernels.of(grad).embedding_backward_weight(grad, cupy.asarray(ids), 0, cupy.asarray(dy))
        found.append(to_host(grad))
    assert all(np.array_equal(grad, found[0]) for grad in found)
    np.testing.assert_allclose(found[0], [dy[ids == row].sum(0, dtype=np.float64) for row in range(3)], rtol=1e-4)
