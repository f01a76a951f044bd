// A token's sum over the rows of its experts, and the gradient of the sum's weights.

#include "common.cuh"

constexpr int THREADS = 256;

// y[t] = sum over j of gates[t, j] choices[t, j], in the order of j. A thread has one pack of a token's row: those of a
// row are blockIdx.y's blocks of blockDim.x, tokens blockIdx.x's of blockDim.y.
template <class T>
__global__ void __launch_bounds__(THREADS) combine(
    const T* gates, const T* choices, T* y, int64 tokens, int64 experts, int64 n
) {
    constexpr int N = LANES<T>;
    const int64 t = int64(blockIdx.x) * blockDim.y + threadIdx.y;
    const int64 at = (int64(blockIdx.y) * blockDim.x + threadIdx.x) * N;
    if (t >= tokens || at >= n) return;
    const bool whole = aligned<N>(choices, n) && aligned<N>(y);
    gates += t * experts, choices += t * experts * n;
    Wide<T> sums[N] = {};
#pragma unroll 4
    for (int64 j = 0; j < experts; j++) {
        const Pack<T> pack = load(choices + j * n, at, n, whole);
        const Wide<T> gate = widen(gates[j]);
#pragma unroll
        for (int k = 0; k < N; k++) sums[k] += gate * widen(pack.at[k]);
    }
    Pack<T> made;
#pragma unroll
    for (int k = 0; k < N; k++) made.at[k] = narrow<T>(sums[k]);
    store(y + t * n, at, n, whole, made);
}

// dgates[t, j] = dy[t] . choices[t, j]. A warp for each (t, j); those of a token are neighbours, and share dy's row in
// the cache.
template <class T>
__global__ void __launch_bounds__(THREADS) combine_backward_gates(
    const T* dy, const T* choices, Wide<T>* dgates, int64 pairs, int64 experts, int64 n
) {
    constexpr int N = LANES<T>, AHEAD = 4;
    const int64 pair = int64(blockIdx.x) * blockDim.y + threadIdx.y;
    if (pair >= pairs) return;  // the whole warp
    const bool whole = aligned<N>(choices, n) && aligned<N>(dy);
    choices += pair * n, dy += pair / experts * n;
    Wide<T> total = 0;
    for (int64 begin = threadIdx.x * N; begin < n; begin += AHEAD * 32 * N) {
        Pack<T> a[AHEAD], b[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int64 at = begin + i * 32 * N;
            if (at >= n) continue;
            a[i] = load(choices, at, n, whole), b[i] = load(dy, at, n, whole);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (begin + i * 32 * N < n)
#pragma unroll
                for (int k = 0; k < N; k++) total += widen(a[i].at[k]) * widen(b[i].at[k]);
    }
    total = warp_reduce<Add>(total);
    if (threadIdx.x == 0) dgates[pair] = total;
}
