// Dropout by global index, and rotary positions: what depends on where a number stands.

#include "common.cuh"

// y = x keep / (1 - rate), added to `onto` unless that is null; x (rows, n), the mask drawn here.
template <class T>
__global__ void __launch_bounds__(256) dropout(
    const T* x, const T* onto, T* y, Mask mask, const int64* i, const int64* j, const int64* extra, int64 rows, int64 n,
    unsigned chunks
) {
    constexpr int N = LANES<T>;
    using W = Wide<T>;
    const Tile tile(N, 1, chunks);
    if (tile.row >= rows || tile.begin >= n) return;
    const bool whole = aligned<N>(x, n) && aligned<N>(onto) && aligned<N>(y) && tile.inside(n, 1);
    const int64 from = tile.row * n;
    Pack<T> before, made = load(x + from, tile.begin, n, whole);
    if (onto) before = load(onto + from, tile.begin, n, whole);
    unsigned words[N];
    mask_words(words, mask, mask_row(mask, i, j, extra, tile.row), tile.begin);
    const W factor = W(mask.factor);
#pragma unroll
    for (int k = 0; k < N; k++) {
        const W kept = widen(made.at[k]) * (words[k] >= mask.threshold ? factor : W(0));
        made.at[k] = narrow<T>(onto ? widen(before.at[k]) + kept : kept);
    }
    store(y + from, tile.begin, n, whole, made);
}

// y = (a cos - b sin, b cos + a sin, rest) of rows (a, b, rest) = x of n numbers; a, b, cos and sin have `half`, and
// `together` rows lie at one position, which is a row of cos and sin. A thread has a pack of a and b, or one of the
// rest.
template <class T>
__global__ void __launch_bounds__(256) rope(
    const T* x, const T* cos, const T* sin, T* y, int64 rows, int64 n, int64 half, int64 together, unsigned chunks
) {
    constexpr int N = LANES<T>;
    using W = Wide<T>;
    const Tile tile(1, 1, chunks);
    if (tile.row >= rows) return;
    x += tile.row * n, y += tile.row * n;
    const int64 pairs = (half + N - 1) / N, rest = n - 2 * half;
    const bool even = half % N == 0;
    if (tile.begin >= pairs) {
        const int64 at = (tile.begin - pairs) * N;
        const bool whole = even && aligned<N>(x) && aligned<N>(y) && at + N <= rest;
        if (at < rest) store(y + 2 * half, at, rest, whole, load(x + 2 * half, at, rest, whole));
        return;
    }
    const int64 at = tile.begin * N;
    const T *angle_cos = cos + tile.row / together * half, *angle_sin = sin + tile.row / together * half;
    const bool whole = even && aligned<N>(x) && aligned<N>(y) && aligned<N>(cos) && aligned<N>(sin);
    Pack<T> a = load(x, at, half, whole), b = load(x + half, at, half, whole);
    const Pack<T> c = load(angle_cos, at, half, whole), s = load(angle_sin, at, half, whole);
#pragma unroll
    for (int k = 0; k < N; k++) {
        const W first = widen(a.at[k]), second = widen(b.at[k]), u = widen(c.at[k]), v = widen(s.at[k]);
        a.at[k] = narrow<T>(first * u - second * v);
        b.at[k] = narrow<T>(second * u + first * v);
    }
    store(y, at, half, whole, a);
    store(y + half, at, half, whole, b);
}
