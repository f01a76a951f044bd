// The sum of squares in double precision: sums by block, then the sum of those, both in a fixed order.

#include "common.cuh"

constexpr int UNROLL = 4;

// parts[block] = the sum of x^2 over every gridDim.x-th piece of UNROLL packs a thread.
template <class T> __global__ void __launch_bounds__(256) square_parts(const T* x, double* parts, int64 n) {
    constexpr int N = LANES<T>;
    const int64 tile = int64(blockDim.x) * N, step = tile * UNROLL;
    const bool whole = aligned<N>(x);
    double sum = 0;
    for (int64 first = blockIdx.x * step; first < n; first += gridDim.x * step) {
        Pack<T> packs[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int64 at = first + u * tile + threadIdx.x * N;
            packs[u] = load(x, at, n, whole && at + N <= n);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
#pragma unroll
            for (int k = 0; k < N; k++) sum += double(widen(packs[u].at[k])) * double(widen(packs[u].at[k]));
    }
    sum = row_sum(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// total += the sum of the parts; one block.
__global__ void __launch_bounds__(256) add_parts(const double* parts, double* total, int64 n) {
    double sum = 0;
    for (int64 k = threadIdx.x; k < n; k += blockDim.x) sum += parts[k];
    sum = row_sum(sum);
    if (threadIdx.x == 0) *total += sum;
}
