// Cross-entropy over rows of logits, which lie one after the other: a pass to read them, and one to write over them.
//
// A block has the threads of one threadIdx.y, a multiple of 32, for each of a few rows; see `_rows` in loss.py.

#include "common.cuh"

constexpr int THREADS = 512, AHEAD = 4;  // packs that a thread has on the way at once

// -infinity: NVRTC has no header for it.
template <class W> __device__ inline W nothing() { return W(__int_as_float(int(0xff800000u))); }

// The largest of some numbers and the sum of their exponentials, less it.
template <class W> struct Parts {
    W top, total;

    __device__ inline void raise(W to) {
        if (to > top) {
            total *= exponential(top - to);  // 0 while there is nothing: top is -inf
            top = to;
        }
    }
};

// each(at, pack) for this thread's packs of a row of n numbers, AHEAD of which are on the way at once.
template <bool WHOLE, class T, class Each> __device__ inline void row_packs(const T* x, int64 n, Each each) {
    const int64 step = int64(blockDim.x) * LANES<T>;
    for (int64 begin = int64(threadIdx.x) * LANES<T>; begin < n; begin += AHEAD * step) {
        Pack<T> packs[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; a++)
            if (begin + a * step < n) packs[a] = load(x, begin + a * step, n, WHOLE);
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            if (begin + a * step >= n) break;
            each(begin + a * step, packs[a]);
        }
    }
}

template <bool WHOLE, class T> __device__ inline Parts<Wide<T>> row_parts(const T* x, int64 n) {
    using W = Wide<T>;
    constexpr int N = LANES<T>;
    Parts<W> parts = {nothing<W>(), 0};
    row_packs<WHOLE>(x, n, [&](int64 at, const Pack<T>& pack) {
        W values[N], top = nothing<W>();
#pragma unroll
        for (int k = 0; k < N; k++) {
            values[k] = WHOLE || at + k < n ? widen(pack.at[k]) : nothing<W>();
            top = Max::of(top, values[k]);
        }
        parts.raise(top);
        const W shift = parts.top == nothing<W>() ? W(0) : parts.top;  // else exp(-inf + inf)
#pragma unroll
        for (int k = 0; k < N; k++) parts.total += exponential(values[k] - shift);
    });
    return parts;
}

template <class T>
__global__ void __launch_bounds__(THREADS) cross_entropy_parts(
    const T* logits, const int64* targets, int64 first, Wide<T>* top, Wide<T>* total, Wide<T>* chosen, int64 rows, int64 n
) {
    using W = Wide<T>;
    const int64 row = int64(blockIdx.x) * blockDim.y + threadIdx.y, width = row < rows ? n : 0;
    const bool whole = aligned<LANES<T>>(logits, n);
    logits += row * n;
    const Parts<W> mine = whole ? row_parts<true>(logits, width) : row_parts<false>(logits, width);
    const W largest = row_max(mine.top);
    const W sum = row_sum(mine.top == nothing<W>() ? mine.total : mine.total * exponential(mine.top - largest));
    if (width && threadIdx.x == 0) {
        const int64 column = targets[row] - first;
        top[row] = largest;
        total[row] = sum;
        chosen[row] = column >= 0 && column < n ? widen(logits[column]) : W(0);
    }
}

template <bool WHOLE, class T>
__device__ inline void row_backward(T* x, int64 n, Wide<T> scale, Wide<T> lse, int64 column) {
    using W = Wide<T>;
    row_packs<WHOLE>(x, n, [&](int64 at, Pack<T>& pack) {
#pragma unroll
        for (int k = 0; k < LANES<T>; k++) {
            const W p = exponential(widen(pack.at[k]) - lse);
            pack.at[k] = narrow<T>(scale * (at + k == column ? p - W(1) : p));
        }
        store(x, at, n, WHOLE, pack);
    });
}

template <class T>
__global__ void __launch_bounds__(THREADS) cross_entropy_backward(
    const Wide<T>* scale, T* logits, const int64* targets, int64 first, const Wide<T>* lse, int64 rows, int64 n
) {
    const int64 row = int64(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    const bool whole = aligned<LANES<T>>(logits, n);
    const int64 column = targets[row] - first;
    if (whole) row_backward<true>(logits + row * n, n, scale[row], lse[row], column);
    else row_backward<false>(logits + row * n, n, scale[row], lse[row], column);
}
