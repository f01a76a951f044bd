// What is done element by element: activations, sums of two arrays, roundings.

#include "common.cuh"

// Packs of each array that a thread has in flight at once.
constexpr int UNROLL = 4;

// out = f(a, b), or f(a, a) if not BINARY; every pack is read before the first is written.
template <int U, bool BINARY, bool WHOLE, class F, class T>
__device__ inline void map_packs(F f, const Tile& tile, const T* a, const T* b, T* out, int64 n) {
    constexpr int N = LANES<T>;
    Pack<T> first[U], second[U];
#pragma unroll
    for (int u = 0; u < U; u++) {
        const int64 at = tile.begin + int64(u) * tile.step;
        if (at < n) first[u] = load(a, at, n, WHOLE);
        if (BINARY && at < n) second[u] = load(b, at, n, WHOLE);
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
        const int64 at = tile.begin + int64(u) * tile.step;
        if (at >= n) continue;
        Pack<T> made;
#pragma unroll
        for (int k = 0; k < N; k++)
            made.at[k] = narrow<T>(f(widen(first[u].at[k]), widen((BINARY ? second : first)[u].at[k])));
        store(out, at, n, WHOLE, made);
    }
}

template <int U, bool BINARY, class F, class T>
__device__ inline void map(F f, const T* a, const T* b, T* out, int64 n, unsigned chunks) {
    constexpr int N = LANES<T>;
    const Tile tile(N, U, chunks);
    if (aligned<N>(a) && aligned<N>(b) && aligned<N>(out) && tile.inside(n, U))
        map_packs<U, BINARY, true>(f, tile, a, b, out, n);
    else
        map_packs<U, BINARY, false>(f, tile, a, b, out, n);
}

// 1 / (1 + exp(-2 u)) with u the argument of GELU's tanh: (1 + tanh u) / 2. Beyond 80 the exponential would overflow.
template <class W> __device__ inline W gelu_gate(W x) {
    const W u = W(0.7978845608028654) * x * (W(1) + W(0.044715) * x * x), top = -2 * u;
    return W(1) / (W(1) + exponential(top < W(80) ? top : W(80)));
}

template <class W> __device__ inline W sigmoid(W x) { return W(1) / (W(1) + exponential(-x < W(80) ? -x : W(80))); }

struct Gelu {
    template <class W> __device__ W operator()(W x, W) const { return x * gelu_gate(x); }
};
struct GeluBackward {
    template <class W> __device__ W operator()(W dy, W x) const {
        const W s = gelu_gate(x), slope = W(2 * 0.7978845608028654) * (W(1) + W(3 * 0.044715) * x * x);
        return dy * (s + x * s * (W(1) - s) * slope);
    }
};
struct Plus {
    template <class W> __device__ W operator()(W a, W b) const { return a + b; }
};

template <class T> __global__ void __launch_bounds__(256) gelu(const T* x, T* y, int64 n, unsigned chunks) {
    map<UNROLL, false>(Gelu(), x, x, y, n, chunks);
}

template <class T>
__global__ void __launch_bounds__(256) gelu_backward(const T* dy, const T* x, T* dx, int64 n, unsigned chunks) {
    map<UNROLL / 2, true>(GeluBackward(), dy, x, dx, n, chunks);
}

template <class T>
__global__ void __launch_bounds__(256) add(const T* x, const T* y, T* sum, int64 n, unsigned chunks) {
    map<UNROLL / 2, true>(Plus(), x, y, sum, n, chunks);
}

// ---- z += bias, on every row, and y = gelu(z); z and y (rows, n).

template <bool WHOLE, class T>
__device__ inline void bias_gelu_tile(const Tile& tile, T* z, const T* bias, T* y, int64 n) {
    constexpr int U = UNROLL / 2;
    Pack<T> sum[U], added[U];
#pragma unroll
    for (int k = 0; k < U; k++) {
        const int64 at = tile.begin + int64(k) * tile.step;
        if (at < n) sum[k] = load(z, at, n, WHOLE), added[k] = load(bias, at, n, WHOLE);
    }
#pragma unroll
    for (int k = 0; k < U; k++) {
        const int64 at = tile.begin + int64(k) * tile.step;
        if (at >= n) continue;
        Pack<T> made;
#pragma unroll
        for (int c = 0; c < LANES<T>; c++) {
            const Wide<T> whole = widen(sum[k].at[c]) + widen(added[k].at[c]);
            sum[k].at[c] = narrow<T>(whole);
            made.at[c] = narrow<T>(whole * gelu_gate(whole));
        }
        store(z, at, n, WHOLE, sum[k]);
        store(y, at, n, WHOLE, made);
    }
}

template <class T>
__global__ void __launch_bounds__(256) bias_gelu(T* z, const T* bias, T* y, int64 rows, int64 n, unsigned chunks) {
    constexpr int N = LANES<T>, U = UNROLL / 2;
    const Tile tile(N, U, chunks);
    if (tile.row >= rows) return;
    z += tile.row * n, y += tile.row * n;
    if (aligned<N>(z, n) && aligned<N>(bias) && aligned<N>(y) && tile.inside(n, U))
        bias_gelu_tile<true>(tile, z, bias, y, n);
    else
        bias_gelu_tile<false>(tile, z, bias, y, n);
}

// ---- SwiGLU: x (rows, 2, n) holds gates and ups, y (rows, n).

template <bool WHOLE, class T>
__device__ inline void swiglu_tile(const Tile& tile, const T* gate, const T* up, T* y, int64 n) {
    constexpr int U = UNROLL / 2;
    Pack<T> g[U], u[U];
#pragma unroll
    for (int k = 0; k < U; k++) {
        const int64 at = tile.begin + int64(k) * tile.step;
        if (at < n) g[k] = load(gate, at, n, WHOLE), u[k] = load(up, at, n, WHOLE);
    }
#pragma unroll
    for (int k = 0; k < U; k++) {
        const int64 at = tile.begin + int64(k) * tile.step;
        if (at >= n) continue;
        Pack<T> made;
#pragma unroll
        for (int c = 0; c < LANES<T>; c++) {
            const Wide<T> a = widen(g[k].at[c]);
            made.at[c] = narrow<T>(a * sigmoid(a) * widen(u[k].at[c]));
        }
        store(y, at, n, WHOLE, made);
    }
}

template <class T>
__global__ void __launch_bounds__(256) swiglu(const T* x, T* y, int64 rows, int64 n, unsigned chunks) {
    constexpr int N = LANES<T>, U = UNROLL / 2;
    const Tile tile(N, U, chunks);
    if (tile.row >= rows) return;
    const T* gate = x + 2 * tile.row * n;
    y += tile.row * n;
    if (aligned<N>(x, n) && aligned<N>(y) && tile.inside(n, U)) swiglu_tile<true>(tile, gate, gate + n, y, n);
    else swiglu_tile<false>(tile, gate, gate + n, y, n);
}

template <bool WHOLE, class T>
__device__ inline void swiglu_backward_pack(
    int64 at, const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64 n
) {
    using W = Wide<T>;
    const Pack<T> d = load(dy, at, n, WHOLE), g = load(gate, at, n, WHOLE), u = load(up, at, n, WHOLE);
    Pack<T> dg, du;
#pragma unroll
    for (int c = 0; c < LANES<T>; c++) {
        const W a = widen(g.at[c]), s = sigmoid(a), given = widen(d.at[c]);
        dg.at[c] = narrow<T>(given * widen(u.at[c]) * s * (W(1) + a * (W(1) - s)));
        du.at[c] = narrow<T>(given * a * s);
    }
    store(dgate, at, n, WHOLE, dg);
    store(dup, at, n, WHOLE, du);
}

template <class T>
__global__ void __launch_bounds__(256)
    swiglu_backward(const T* dy, const T* x, T* dx, int64 rows, int64 n, unsigned chunks) {
    constexpr int N = LANES<T>;
    const Tile tile(N, 1, chunks);
    if (tile.row >= rows || tile.begin >= n) return;
    const T* gate = x + 2 * tile.row * n;
    T* dgate = dx + 2 * tile.row * n;
    dy += tile.row * n;
    if (aligned<N>(dy, n) && aligned<N>(x) && aligned<N>(dx) && tile.inside(n, 1))
        swiglu_backward_pack<true>(tile.begin, dy, gate, gate + n, dgate, dgate + n, n);
    else
        swiglu_backward_pack<false>(tile.begin, dy, gate, gate + n, dgate, dgate + n, n);
}

// ---- y = x, rounded to B once.

template <class A, class B>
__global__ void __launch_bounds__(256) assign(B* y, const A* x, int64 n, unsigned chunks) {
    constexpr int N = sizeof(A) > sizeof(B) ? LANES<B> : LANES<A>, U = UNROLL / 2;
    const Tile tile(N, U, chunks);
    const bool whole = aligned<N>(x) && aligned<N>(y) && tile.inside(n, U);
    Pack<A, N> read[U];
#pragma unroll
    for (int u = 0; u < U; u++) {
        const int64 at = tile.begin + int64(u) * tile.step;
        if (at < n) read[u] = load<A, N>(x, at, n, whole);
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
        const int64 at = tile.begin + int64(u) * tile.step;
        if (at >= n) continue;
        Pack<B, N> made;
#pragma unroll
        for (int k = 0; k < N; k++) made.at[k] = narrow<B>(widen(read[u].at[k]));
        store<B, N>(y, at, n, whole, made);
    }
}
