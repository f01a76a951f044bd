"""The emulation of CUDA itself: barriers and shuffles mean what they mean on a GPU; what is wrong there fails here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcmp.arrays import dtype_of
from hpcmp.kernels.cuda import launch
from tests.kernels.emulation.backend import emulated, needs_gxx

pytestmark = [needs_gxx, pytest.mark.timeout(300)]  # g++ builds what has changed

SOURCE = """
#include "common.cuh"

extern __shared__ __align__(16) unsigned char dynamic_shared[];

// out[t] = in[the last thread - t], through shared memory.
__global__ void turned(const int* in, int* out) {
    int* all = reinterpret_cast<int*>(dynamic_shared);
    all[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = all[blockDim.x - 1 - threadIdx.x];
}

// By row of `out`, what each lane gets: from its neighbour on either side, from lane 3 of its eight, and who is odd.
__global__ void shuffled(const int* in, int* out) {
    const int lane = threadIdx.x, value = in[lane];
    if (lane >= 16) {  // the two halves of a warp may go different ways
        out[lane] = __shfl_xor_sync(0xffff0000u, value, 1);
    } else {
        out[lane] = -__shfl_xor_sync(0x0000ffffu, value, 1);
    }
    out[32 + lane] = __shfl_down_sync(0xffffffffu, value, 1);
    out[64 + lane] = __shfl_up_sync(0xffffffffu, value, 1);
    out[96 + lane] = __shfl_sync(0xffffffffu, value, 3, 8);
    out[128 + lane] = __ballot_sync(0xffffffffu, value % 2);
}

// The first warp waits for the block, the second for its own lanes, of which one waits for the block.
__global__ void stuck() {
    if (threadIdx.x > 32) __syncwarp();
    __syncthreads();
}

template <class T> __global__ void converted(const float* x, T* y, float* z, int64 n) {
    for (int64 k = threadIdx.x; k < n; k += blockDim.x) y[k] = narrow<T>(x[k]), z[k] = widen(y[k]);
}

// Four numbers at once, from a place that must be aligned; and one of a small array.
__global__ void four(const int* in, int* out) { *reinterpret_cast<int4*>(out) = *reinterpret_cast<const int4*>(in); }
__global__ void fifth(const int* in, int* out) {
    int four[4] = {};
    four[in[0]] = 7;
    out[0] = four[in[1]];
}

// The sum of a row's numbers, the row's threads being those of a threadIdx.y; and the largest.
__global__ void reduced(const float* in, float* sums, float* tops) {
    const int at = threadIdx.y * blockDim.x + threadIdx.x;
    sums[at] = row_sum(in[at]);
    tops[at] = row_max(in[at]);
}
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``run(kernel, block, *args, types=(), shared=0)`` launches one block of a kernel of SOURCE."""
    common = launch.text("squares").split("constexpr int UNROLL")[0]
    monkeypatch.setattr(launch, "text", lambda source: SOURCE.replace('#include "common.cuh"', common))
    monkeypatch.setitem(launch.INSTANCES, "test", {})
    plain = ("turned", "shuffled", "stuck", "reduced", "four", "fifth")
    launch.declare("test", dict.fromkeys(plain, [()]) | {"converted": launch.FLOATS[2:]})

    def run(kernel: str, block: tuple[int, ...], *args: Any, types: Any = (), shared: int = 0) -> None:
        launch.launch("test", kernel, types, (1,), block, *args, shared=shared)

    with emulated():
        yield run


def test_barriers(run: Any) -> None:
    x, y = np.arange(100, dtype=np.int32), np.zeros(100, np.int32)
    run("turned", (100,), x, y, shared=400)
    np.testing.assert_array_equal(y, x[::-1])


def test_shuffles(run: Any) -> None:
    x, lanes = np.arange(32, dtype=np.int32) * 3, np.arange(32)
    out = np.zeros((5, 32), np.int32)
    run("shuffled", (32,), x, out)
    np.testing.assert_array_equal(out[0], np.where(lanes < 16, -x[lanes ^ 1], x[lanes ^ 1]))
    np.testing.assert_array_equal(out[1], x[np.minimum(lanes + 1, 31)])
    np.testing.assert_array_equal(out[2], x[np.maximum(lanes - 1, 0)])
    np.testing.assert_array_equal(out[3], x[lanes // 8 * 8 + 3])
    assert set(out[4].view(np.uint32)) == {sum(1 << lane for lane in range(1, 32, 2))}


@pytest.mark.parametrize(("threads", "rows"), [(32, 3), (96, 2), (544, 1), (1024, 1)])
def test_reductions_over_rows(run: Any, threads: int, rows: int) -> None:
    x = np.random.default_rng(0).normal(size=(rows, threads)).astype(np.float32) - 5
    sums, tops = np.zeros_like(x), np.zeros_like(x)
    run("reduced", (threads, rows), x, sums, tops)
    np.testing.assert_allclose(sums, np.broadcast_to(x.sum(1, keepdims=True), x.shape), rtol=1e-5)
    np.testing.assert_array_equal(tops, np.broadcast_to(x.max(1, keepdims=True), x.shape))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_16_bits_are_rounded_as_numpy_rounds_them(run: Any, name: str) -> None:
    dtype = dtype_of(name)
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32)
    finite = every[np.abs(every) < 1e4]
    x = np.concatenate([every, (finite[1:] + finite[:-1]) / 2, finite * np.float32(1.0003), np.float32([7e4, -3e38])])
    y, z = np.zeros(x.size, dtype), np.zeros(x.size, np.float32)
    run("converted", (64,), x, y, z, x.size, types=(dtype,))
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_array_equal(z, x.astype(dtype).astype(np.float32))
    np.testing.assert_array_equal(y.astype(np.float32), z)


def test_who_waits_for_ever_is_told(run: Any) -> None:
    with pytest.raises(RuntimeError, match="stuck waits for ever"):
        run("stuck", (64,))
    test_barriers(run)  # afterwards all is well


def test_too_little_shared_memory_is_told(run: Any) -> None:
    x = np.zeros(100, np.int32)
    with pytest.raises(RuntimeError, match="turned wrote beyond its dynamic shared memory"):
        run("turned", (100,), x + 1, x, shared=396)


def test_an_access_that_is_not_aligned_is_told(run: Any) -> None:
    x, y = np.arange(8, dtype=np.int32), np.zeros(4, np.int32)
    assert x.ctypes.data % 16 == y.ctypes.data % 16 == 0
    run("four", (1,), x, y)
    np.testing.assert_array_equal(y, x[:4])
    with pytest.raises(RuntimeError, match="four moved numbers at once at an address that is no multiple"):
        run("four", (1,), x[1:], y)


def test_an_index_beyond_an_array_of_the_kernels_is_told(run: Any) -> None:
    y = np.zeros(1, np.int32)
    run("fifth", (1,), np.array([3, 3], np.int32), y)
    assert y == 7
    with pytest.raises(RuntimeError, match="fifth .* beyond an array of its own"):
        run("fifth", (1,), np.array([4, 3], np.int32), y)


def test_arrays_and_arguments_that_do_not_fit_are_told() -> None:
    """Reads and writes outside arrays, arguments that do not fit, and instances that are not compiled."""
    x = np.ones((3, 64), np.float32)
    y, rstd, w = np.empty_like(x), np.empty(3, np.float32), np.ones(64, np.float32)

    def norm(*changed: Any, types: Any = (x.dtype, False), rows: Any = 3) -> None:
        args = [x, w, None, 1e-5, y, None, rstd]
        for place, value in changed:
            args[place] = value
        launch.launch("norm", "norm", types, (1,), (32, 8), *args, rows, 64)

    with emulated():
        norm()
        np.testing.assert_allclose(y, 1, rtol=1e-4)
        with pytest.raises(RuntimeError, match=r"norm<float, false> touched memory outside its arguments"):
            norm((0, x[:2]))  # a row short
        with pytest.raises(RuntimeError, match="outside"):
            norm((4, y[:2]))
        with pytest.raises(AssertionError, match="wrote beside an array of 8 bytes"):
            norm((6, rstd[:2]))
        with pytest.raises(TypeError, match="for a parameter of the kind p4"):
            norm((0, x.astype(np.float64)))
        with pytest.raises(TypeError, match="for a parameter of the kind i8"):
            norm(rows=3.0)
        with pytest.raises(KeyError, match="norm<int, false> is not declared"):
            norm(types=(np.dtype(np.int32), False))
        norm()  # after errors
