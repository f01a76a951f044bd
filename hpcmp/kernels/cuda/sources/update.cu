// Optimizers' steps over flat arrays: a thread moves one pack of each. The gradient is multiplied by `scale` or, unless it
// is null, by `*factor`: by NaN, and nothing changes.

#include "common.cuh"

constexpr int THREADS = 256;

// What a step multiplies its gradient by, from the sum of its squares and the loss; `nothing` (NaN) if one of them is not
// finite, as x - x tells, or it was NaN before: every further step then changes nothing, too. One thread.
__global__ void clip_factor(const double* sums, double* factor, double clip, double scale, double nothing) {
    const double norm = sqrt(sums[0]) / scale, loss = sums[1], before = *factor;
    const bool sound = norm - norm == 0 && loss - loss == 0 && before == before;
    *factor = sound ? (norm <= clip ? 1.0 : clip / norm) / scale : nothing;
}

// Adam's moments move on; its direction, before the learning rate.
template <class W> struct Adam {
    W b1, c1, b2, c2, r1, r2, epsilon, scale;

    __device__ inline Adam(double b1, double b2, double r1, double r2, double epsilon, double scale)
        : b1(b1), c1(1 - b1), b2(b2), c2(1 - b2), r1(r1), r2(r2), epsilon(epsilon), scale(scale) {}

    __device__ inline W operator()(W grad, W& m, W& v) const {
        const W g = grad * scale;
        m = b1 * m + c1 * g;
        v = b2 * v + c2 * g * g;
        return m * r1 / (root(v * r2) + epsilon);
    }
};

// AdamW; `out` gets the new weights too, rounded, unless it is null. r1 and r2: 1 / (1 - b^t).
template <class W, class T>
__global__ void __launch_bounds__(THREADS) adamw(
    W* data, const W* grad, W* m, W* v, T* out, double b1, double b2, double r1, double r2, double epsilon, double scale,
    const double* factor, double rate, double decay, int64 n
) {
    constexpr int N = LANES<W>;
    const int64 at = (int64(blockIdx.x) * THREADS + threadIdx.x) * N;
    if (factor) scale = *factor;
    if (at >= n || scale != scale) return;
    const Adam<W> adam(b1, b2, r1, r2, epsilon, scale);
    const W step = rate, shrink = decay;
    const bool whole = at + N <= n && aligned<N>(data) && aligned<N>(grad) && aligned<N>(m) && aligned<N>(v) && aligned<N>(out);
    Pack<W> weight = load(data, at, n, whole), first = load(m, at, n, whole), second = load(v, at, n, whole);
    const Pack<W> gradient = load(grad, at, n, whole);
    Pack<T, N> rounded;
#pragma unroll
    for (int k = 0; k < N; k++) {
        weight.at[k] -= step * (adam(gradient.at[k], first.at[k], second.at[k]) + shrink * weight.at[k]);
        rounded.at[k] = narrow<T>(weight.at[k]);
    }
    store(data, at, n, whole, weight);
    store(m, at, n, whole, first);
    store(v, at, n, whole, second);
    if (out) store<T, N>(out, at, n, whole, rounded);
}

// direction: zero where nothing changes.
template <class W>
__global__ void __launch_bounds__(THREADS) adam_update(
    const W* grad, W* m, W* v, W* direction, double b1, double b2, double r1, double r2, double epsilon, double scale,
    const double* factor, int64 n
) {
    constexpr int N = LANES<W>;
    const int64 at = (int64(blockIdx.x) * THREADS + threadIdx.x) * N;
    if (factor) scale = *factor;
    if (at >= n) return;
    const bool whole = at + N <= n && aligned<N>(grad) && aligned<N>(m) && aligned<N>(v) && aligned<N>(direction);
    if (scale != scale) return store(direction, at, n, whole, Pack<W>{});
    const Adam<W> adam(b1, b2, r1, r2, epsilon, scale);
    Pack<W> first = load(m, at, n, whole), second = load(v, at, n, whole), made = load(grad, at, n, whole);
#pragma unroll
    for (int k = 0; k < N; k++) made.at[k] = adam(made.at[k], first.at[k], second.at[k]);
    store(direction, at, n, whole, made);
    store(m, at, n, whole, first);
    store(v, at, n, whole, second);
}

// m <- momentum m + g; data <- data - rate (m + decay data).
template <class W>
__global__ void __launch_bounds__(THREADS) sgd(
    W* data, const W* grad, W* m, double rate, double momentum, double decay, double scale,
    const double* factor, int64 n
) {
    constexpr int N = LANES<W>;
    const int64 at = (int64(blockIdx.x) * THREADS + threadIdx.x) * N;
    if (factor) scale = *factor;
    if (at >= n || scale != scale) return;
    const bool whole = at + N <= n && aligned<N>(data) && aligned<N>(grad) && aligned<N>(m);
    Pack<W> weight = load(data, at, n, whole), mean = load(m, at, n, whole);
    const Pack<W> gradient = load(grad, at, n, whole);
#pragma unroll
    for (int k = 0; k < N; k++) {
        mean.at[k] = W(momentum) * mean.at[k] + gradient.at[k] * W(scale);
        weight.at[k] -= W(rate) * (mean.at[k] + W(decay) * weight.at[k]);
    }
    store(data, at, n, whole, weight);
    store(m, at, n, whole, mean);
}

// m <- momentum m + g; ahead = g + momentum m, or zero where nothing changes.
template <class W>
__global__ void __launch_bounds__(THREADS) nesterov(
    const W* grad, W* m, W* ahead, double momentum, double scale, const double* factor, int64 n
) {
    constexpr int N = LANES<W>;
    const int64 at = (int64(blockIdx.x) * THREADS + threadIdx.x) * N;
    if (factor) scale = *factor;
    if (at >= n) return;
    const bool whole = at + N <= n && aligned<N>(grad) && aligned<N>(m) && aligned<N>(ahead);
    if (scale != scale) return store(ahead, at, n, whole, Pack<W>{});
    Pack<W> made = load(grad, at, n, whole), mean = load(m, at, n, whole);
#pragma unroll
    for (int k = 0; k < N; k++) {
        const W g = made.at[k] * W(scale);
        mean.at[k] = W(momentum) * mean.at[k] + g;
        made.at[k] = g + W(momentum) * mean.at[k];
    }
    store(m, at, n, whole, mean);
    store(ahead, at, n, whole, made);
}

// data <- data - rate (direction + decay data); rate: `number` or, unless it is null, `*where`. NaN: nothing changes.
template <class W>
__global__ void __launch_bounds__(THREADS) descend(
    W* data, const W* direction, double number, const double* where, double decay, int64 n
) {
    constexpr int N = LANES<W>;
    const int64 at = (int64(blockIdx.x) * THREADS + threadIdx.x) * N;
    const double rate = where ? *where : number;
    if (at >= n || rate != rate) return;
    const bool whole = at + N <= n && aligned<N>(data) && aligned<N>(direction);
    Pack<W> weight = load(data, at, n, whole);
    const Pack<W> along = load(direction, at, n, whole);
#pragma unroll
    for (int k = 0; k < N; k++) weight.at[k] -= W(rate) * (along.at[k] + W(decay) * weight.at[k]);
    store(data, at, n, whole, weight);
}
