// Dropout by global index, and rotary positions: what depends on where a number stands.

#include "common.cuh"

// y = x keep / (1 - rate), added to `onto` unless that is null; x (rows, n), the mask drawn here.
template <class T>
__global__ void __launch_bounds__(256) dropout(
    const T* x, const T* onto, T* y, Mask mask, const int64* key, const int64* i, const int64* j, const int64* extra,
    int64 rows, int64 n, unsigned chunks
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
    mask_words(words, mask, MaskKey(key), mask_row(mask, i, j, extra, tile.row), tile.begin);
    const W factor = W(mask.factor);
#pragma unroll
    for (int k = 0; k < N; k++) {
        const W kept = widen(made.at[k]) * (words[k] >= mask.threshold ? factor : W(0));
        made.at[k] = narrow<T>(onto ? widen(before.at[k]) + kept : kept);
    }
    store(y + from, tile.begin, n, whole, made);
}

// In place, (a, b) of a row = (a cos - b sin, b cos + a sin), for rows of x that are `steps` apart by position, sample
// and head; a, b, cos and sin have `half` numbers, and a position is a row of cos and sin. A thread has a pack of a and
// the one of b that turns with it.
template <class T>
__global__ void __launch_bounds__(256) rope(
    T* x, const T* cos, const T* sin, int64 step_position, int64 step_sample, int64 step_head, int64 rows,
    int64 samples, int64 heads, int64 half, unsigned chunks
) {
    constexpr int N = LANES<T>;
    using W = Wide<T>;
    const Tile tile(N, 1, chunks);
    if (tile.row >= rows || tile.begin >= half) return;
    const unsigned above = unsigned(tile.row) / unsigned(heads), head = unsigned(tile.row) - above * unsigned(heads);
    const unsigned position = above / unsigned(samples), sample = above - position * unsigned(samples);
    T* row = x + position * step_position + sample * step_sample + head * step_head;
    cos += position * half, sin += position * half;
    const bool whole = half % N == 0 && aligned<N>(row) && aligned<N>(cos) && aligned<N>(sin);
    Pack<T> a = load(row, tile.begin, half, whole), b = load(row + half, tile.begin, half, whole);
    const Pack<T> c = load(cos, tile.begin, half, whole), s = load(sin, tile.begin, half, whole);
#pragma unroll
    for (int k = 0; k < N; k++) {
        const W first = widen(a.at[k]), second = widen(b.at[k]), u = widen(c.at[k]), v = widen(s.at[k]);
        a.at[k] = narrow<T>(first * u - second * v);
        b.at[k] = narrow<T>(second * u + first * v);
    }
    store(row, tile.begin, half, whole, a);
    store(row + half, tile.begin, half, whole, b);
}
