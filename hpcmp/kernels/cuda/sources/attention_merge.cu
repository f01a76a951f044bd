// Attention to two blocks of keys from that to each.

#include "common.cuh"

constexpr float LEAST = -3e38f;  // below it is -inf alone

__device__ inline float natural_logarithm(float x) { return logf(x); }
__device__ inline double natural_logarithm(double x) { return log(x); }

// o1, o2 (s, batch, heads, d), lse1 and lse2 (batch, heads, s). A row of the block's threads takes a row of o.
template <class T>
__global__ void __launch_bounds__(256)
    attention_merge(const T* o1, const Wide<T>* lse1, const T* o2, const Wide<T>* lse2, T* o, Wide<T>* lse, int64 s,
                    int64 columns, int64 d) {
    using A = Wide<T>;
    constexpr int N = LANES<T>;
    const unsigned row = blockIdx.x * blockDim.y + threadIdx.y;  // (position, sample and head), of s x columns
    if (row >= s * columns) return;
    const int64 place = row % unsigned(columns) * s + row / unsigned(columns), start = row * d;
    const A a = lse1[place], b = lse2[place], most = Max::of(a, b);
    const bool none = most < A(LEAST);  // no keys in either: both -inf, and exp(-inf + inf) is no number
    const A shift = none ? A(0) : most, both = shift + natural_logarithm(exponential(a - shift) + exponential(b - shift));
    const A level = none ? A(0) : both, w1 = exponential(a - level), w2 = exponential(b - level);
    const bool all = aligned<N>(o1, d) && aligned<N>(o2, d) && aligned<N>(o, d);
    for (int begin = threadIdx.x * N; begin < d; begin += blockDim.x * N) {
        const bool whole = all && begin + N <= d;
        const Pack<T> x = load(o1 + start, begin, d, whole), y = load(o2 + start, begin, d, whole);
        Pack<T> out;
#pragma unroll
        for (int k = 0; k < N; k++) out.at[k] = narrow<T>(widen(x.at[k]) * w1 + widen(y.at[k]) * w2);
        store(o + start, begin, d, whole, out);
    }
    if (threadIdx.x == 0) lse[place] = both;
}
