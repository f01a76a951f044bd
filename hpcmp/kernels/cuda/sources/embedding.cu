// Rows taken from a table by number, and the adjoint: rows added to those of a table, in the order of the tokens.
//
// A block has the threads of one threadIdx.y for each of a few rows; see `_grid` in embedding.py.

#include "common.cuh"

constexpr int THREADS = 256, AHEAD = 4;  // packs that a thread has on the way at once

template <bool WHOLE, class T>
__device__ inline void take_row(const T* x, Wide<T> scale, bool scaled, T* y, int64 n) {
    constexpr int N = LANES<T>;
    const int64 step = int64(blockDim.x) * N;
    for (int64 begin = int64(threadIdx.x) * N; begin < n; begin += AHEAD * step) {
        Pack<T> packs[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int64 at = begin + a * step;
            if (at >= n) continue;
            if (x) packs[a] = load(x, at, n, WHOLE);
            else
#pragma unroll
                for (int k = 0; k < N; k++) packs[a].at[k] = narrow<T>(0);
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int64 at = begin + a * step;
            if (at >= n) continue;
            if (scaled)
#pragma unroll
                for (int k = 0; k < N; k++) packs[a].at[k] = narrow<T>(scale * widen(packs[a].at[k]));
            store(y, at, n, WHOLE, packs[a]);
        }
    }
}

// y[i] = x[index[i] - first], zero where that is no row of x; times scale[i] unless it is null.
template <class T>
__global__ void __launch_bounds__(THREADS) take_rows(
    const T* x, const int64* index, int64 first, const T* scale, T* y, int64 count, int64 rows, int64 n
) {
    const int64 i = int64(blockIdx.x) * blockDim.y + threadIdx.y;
    if (i >= count) return;
    const int64 row = index[i] - first;
    const bool whole = aligned<LANES<T>>(x, n) && aligned<LANES<T>>(y);
    const T* from = row >= 0 && row < rows ? x + row * n : nullptr;
    const Wide<T> factor = scale ? widen(scale[i]) : Wide<T>(1);
    if (whole) take_row<true>(from, factor, scale != nullptr, y + i * n, n);
    else take_row<false>(from, factor, scale != nullptr, y + i * n, n);
}

constexpr int TOKENS = 8;  // rows that a thread has on the way at once

template <bool WHOLE, class T>
__device__ inline void add_tokens(
    Wide<T>* target, bool onto, const int64* sorted, const int64* token, const T* dy, int64 place, int64 end, int64 n
) {
    constexpr int N = LANES<T>;
    const int64 row = sorted[place], at = (int64(blockIdx.y) * blockDim.x + threadIdx.x) * N;
    if (at >= n) return;
    Pack<Wide<T>, N> sums = {};
    for (int64 p = place; p < end && sorted[p] == row; p += TOKENS) {
        Pack<T> packs[TOKENS];
        bool more[TOKENS];
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            more[t] = p + t < end && sorted[p + t] == row;
            if (more[t]) packs[t] = load(dy + token[p + t] * n, at, n, WHOLE);
        }
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
            if (more[t])
#pragma unroll
                for (int k = 0; k < N; k++) sums.at[k] += widen(packs[t].at[k]);
    }
    if (onto) {
        const Pack<Wide<T>, N> before = load<Wide<T>, N>(target, at, n, WHOLE);
#pragma unroll
        for (int k = 0; k < N; k++) sums.at[k] += before.at[k];
    }
    store<Wide<T>, N>(target, at, n, WHOLE, sums);
}

// Whether a place of `sorted` has the row of the one before it.
__device__ inline bool goes_on(const int64* sorted, int64 place) {
    return place > 0 && sorted[place - 1] == sorted[place];
}

// grad[row] += the sum of dy[token[p]] over the places p with sorted[p] == row, in their order, up to the next multiple of
// `piece`; what a row has from such a multiple on is a sum in parts[multiple / piece] instead, for `add_parts` to add.
// `sorted` rises; rows that are not grad's come last.
template <class T>
__global__ void __launch_bounds__(THREADS) add_rows_by_number(
    Wide<T>* grad, Wide<T>* parts, const int64* sorted, const int64* token, const T* dy, int64 piece, int64 count,
    int64 rows, int64 n
) {
    constexpr int N = LANES<T>;
    const int64 place = int64(blockIdx.x) * blockDim.y + threadIdx.y;
    if (place >= count || sorted[place] >= rows) return;
    const int64 number = place / piece, end = (number + 1) * piece < count ? (number + 1) * piece : count;
    const bool later = goes_on(sorted, place);
    if (later && place % piece) return;  // another's
    Wide<T>* target = later ? parts + number * n : grad + sorted[place] * n;
    if (aligned<N>(dy, n) && aligned<N>(grad, n) && aligned<N>(parts))
        add_tokens<true>(target, !later, sorted, token, dy, place, end, n);
    else
        add_tokens<false>(target, !later, sorted, token, dy, place, end, n);
}

// grad[row] += its parts, in order. The threads of a row's first part do it.
template <class W>
__global__ void __launch_bounds__(THREADS) add_parts(
    W* grad, const W* parts, const int64* sorted, int64 piece, int64 count, int64 rows, int64 n
) {
    const int64 first = (int64(blockIdx.x) * blockDim.y + threadIdx.y + 1) * piece;
    const int64 at = int64(blockIdx.y) * blockDim.x + threadIdx.x;
    if (first >= count || sorted[first] >= rows || !goes_on(sorted, first) || at >= n) return;
    const int64 row = sorted[first];
    if (sorted[first - piece] == row && goes_on(sorted, first - piece)) return;  // not the first
    W total = 0;
    for (int64 place = first; place < count && sorted[place] == row; place += TOKENS * piece) {
        W each[TOKENS];
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const int64 p = place + t * piece;
            each[t] = p < count && sorted[p] == row ? parts[p / piece * n + at] : W(0);
        }
#pragma unroll
        for (int t = 0; t < TOKENS; t++) total += each[t];
    }
    grad[row * n + at] += total;
}
