// LayerNorm (CENTRED) and RMSNorm over rows, which lie one after the other: each is read once, into registers.
//
// A block has the threads of one threadIdx.y, a multiple of 32, for each of a few rows; see `_rows` in norm.py.

#include "common.cuh"

// Packs of a row that a thread keeps in registers; of longer rows it reads the others again, mostly from a cache.
constexpr int KEPT = 2, THREADS = 1024;

template <class T> struct Row {
    const T* at;
    int64 n;  // 0 for a thread without a row, which takes part in the sums all the same
    bool whole;
    Pack<T> kept[KEPT];

    __device__ inline Row(const T* at, int64 n, bool whole) : at(at), n(n), whole(whole) {
#pragma unroll
        for (int k = 0; k < KEPT; k++) {
            const int64 begin = (int64(k) * blockDim.x + threadIdx.x) * LANES<T>;
            if (begin < n) kept[k] = load(at, begin, n, whole);
        }
    }
};

// each(begin, packs of the rows) for the packs that are this thread's.
template <class F, class T, class... Rows>
__device__ inline void for_packs(F each, const Row<T>& row, const Rows&... rows) {
    const int64 step = int64(blockDim.x) * LANES<T>;
    int64 begin = int64(threadIdx.x) * LANES<T>;
#pragma unroll
    for (int k = 0; k < KEPT; k++, begin += step)
        if (begin < row.n) each(begin, row.kept[k], rows.kept[k]...);
    for (; begin < row.n; begin += step)
        each(begin, load(row.at, begin, row.n, row.whole), load(rows.at, begin, row.n, row.whole)...);
}

template <bool WHOLE, bool CENTRED, class T>
__device__ inline void forward_row(
    const T* x, const T* weight, const T* bias, Wide<T> epsilon, T* y, Wide<T>* mean, Wide<T>* rstd, int64 n,
    int64 width
) {
    using W = Wide<T>;
    const Row<T> row(x, width, WHOLE);
    W centre = 0, square = 0;
    if (CENTRED) {
        for_packs([&](int64 begin, const Pack<T>& a) {
#pragma unroll
            for (int k = 0; k < LANES<T>; k++) centre += widen(a.at[k]);  // beyond the end lie zeros
        }, row);
        centre = row_sum(centre) / W(n);
    }
    for_packs([&](int64 begin, const Pack<T>& a) {
#pragma unroll
        for (int k = 0; k < LANES<T>; k++) {
            const W from_mean = WHOLE || begin + k < n ? widen(a.at[k]) - centre : W(0);
            square += from_mean * from_mean;
        }
    }, row);
    const W scale = W(1) / root(row_sum(square) / W(n) + epsilon);
    for_packs([&](int64 begin, const Pack<T>& a) {
        const Pack<T> w = load(weight, begin, n, WHOLE);
        Pack<T> b, out;
        if (CENTRED) b = load(bias, begin, n, WHOLE);
#pragma unroll
        for (int k = 0; k < LANES<T>; k++) {
            const W z = (widen(a.at[k]) - centre) * scale * widen(w.at[k]);
            out.at[k] = narrow<T>(CENTRED ? z + widen(b.at[k]) : z);
        }
        store(y, begin, n, WHOLE, out);
    }, row);
    if (width && threadIdx.x == 0) {
        if (CENTRED) *mean = centre;
        *rstd = scale;
    }
}

// bias and mean are null if not CENTRED.
template <class T, bool CENTRED>
__global__ void __launch_bounds__(THREADS) norm(
    const T* x, const T* weight, const T* bias, double epsilon, T* y, Wide<T>* mean, Wide<T>* rstd, int64 rows, int64 n
) {
    constexpr int N = LANES<T>;
    const int64 row = int64(blockIdx.x) * blockDim.y + threadIdx.y, width = row < rows ? n : 0;
    const bool whole = aligned<N>(x, n) && aligned<N>(y) && aligned<N>(weight) && aligned<N>(bias);
    x += row * n, y += row * n, mean += row, rstd += row;
    if (whole) forward_row<true, CENTRED, T>(x, weight, bias, epsilon, y, mean, rstd, n, width);
    else forward_row<false, CENTRED, T>(x, weight, bias, epsilon, y, mean, rstd, n, width);
}

template <bool WHOLE, bool CENTRED, class T>
__device__ inline void backward_row(
    const T* dy, const T* x, const T* weight, Wide<T> centre, Wide<T> scale, const T* onto, T* dx, int64 n, int64 width
) {
    using W = Wide<T>;
    const Row<T> given(dy, width, WHOLE), row(x, width, WHOLE);
    W sums[2] = {0, 0};  // of g = dy w, and of g z
    for_packs([&](int64 begin, const Pack<T>& d, const Pack<T>& a) {
        const Pack<T> w = load(weight, begin, n, WHOLE);
#pragma unroll
        for (int k = 0; k < LANES<T>; k++) {
            const W g = widen(d.at[k]) * widen(w.at[k]);
            sums[0] += g;
            sums[1] += g * ((widen(a.at[k]) - centre) * scale);
        }
    }, given, row);
    row_reduce<Add>(sums);
    const W first = CENTRED ? sums[0] / W(n) : W(0), second = sums[1] / W(n);
    for_packs([&](int64 begin, const Pack<T>& d, const Pack<T>& a) {
        const Pack<T> w = load(weight, begin, n, WHOLE);
        Pack<T> before, out;
        if (onto) before = load(onto, begin, n, WHOLE);
#pragma unroll
        for (int k = 0; k < LANES<T>; k++) {
            const W z = (widen(a.at[k]) - centre) * scale;
            const W made = scale * (widen(d.at[k]) * widen(w.at[k]) - first - z * second);
            out.at[k] = narrow<T>(onto ? widen(before.at[k]) + made : made);
        }
        store(dx, begin, n, WHOLE, out);
    }, given, row);
}

// Apart, so that it takes no registers of the path that matters.
template <bool CENTRED, class T>
__device__ __noinline__ void backward_unaligned(
    const T* dy, const T* x, const T* weight, Wide<T> centre, Wide<T> scale, const T* onto, T* dx, int64 n, int64 width
) {
    backward_row<false, CENTRED, T>(dy, x, weight, centre, scale, onto, dx, n, width);
}

// dx, added to `onto` unless that is null. mean is null if not CENTRED.
template <class T, bool CENTRED>
__global__ void __launch_bounds__(THREADS) norm_backward(
    const T* dy, const T* x, const T* weight, const Wide<T>* mean, const Wide<T>* rstd, const T* onto, T* dx,
    int64 rows, int64 n
) {
    constexpr int N = LANES<T>;
    const int64 row = int64(blockIdx.x) * blockDim.y + threadIdx.y;
    const bool here = row < rows;
    const bool whole =
        aligned<N>(dy, n) && aligned<N>(x) && aligned<N>(weight) && aligned<N>(onto) && aligned<N>(dx);
    const Wide<T> centre = CENTRED && here ? mean[row] : 0, scale = here ? rstd[row] : 0;
    dy += row * n, x += row * n, dx += row * n;
    if (onto) onto += row * n;
    const int64 width = here ? n : 0;
    if (whole) backward_row<true, CENTRED, T>(dy, x, weight, centre, scale, onto, dx, n, width);
    else backward_unaligned<CENTRED, T>(dy, x, weight, centre, scale, onto, dx, n, width);
}
