// Sums over the rows of matrices, (rows, n), which are gradients of weights: partial sums of pieces of rows, then the
// sum of those, both in a fixed order.

#include "common.cuh"

constexpr int ACROSS = 32, DOWN = 8;  // threads of a block: packs of columns side by side, and rows below each other

// parts_b[piece] = sum dy; parts_w[piece] = sum dy (x - mean) rstd, unless x is null; mean is null for zero. A block
// adds up a piece of `piece` rows: blockIdx.y, of columns blockIdx.x. parts (pieces, n); parts_b may be null.
template <class T, bool WHOLE>
__device__ inline void add_piece(
    const T* dy, const T* x, const Wide<T>* mean, const Wide<T>* rstd, Wide<T>* parts_w, Wide<T>* parts_b, int64 rows,
    int64 n, int64 piece
) {
    using W = Wide<T>;
    constexpr int N = LANES<T>;
    const int64 begin = (int64(blockIdx.x) * ACROSS + threadIdx.x) * N;
    const int64 first = int64(blockIdx.y) * piece, past = first + piece < rows ? first + piece : rows;
    W w[N] = {}, b[N] = {};
    if (begin < n)
#pragma unroll 4
        for (int64 row = first + threadIdx.y; row < past; row += DOWN) {
            const Pack<T> d = load(dy + row * n, begin, n, WHOLE);
#pragma unroll
            for (int k = 0; k < N; k++) b[k] += widen(d.at[k]);
            if (!x) continue;
            const Pack<T> a = load(x + row * n, begin, n, WHOLE);
            const W centre = mean ? mean[row] : W(0), scale = rstd[row];
#pragma unroll
            for (int k = 0; k < N; k++) w[k] += widen(d.at[k]) * ((widen(a.at[k]) - centre) * scale);
        }
    __shared__ W sums[DOWN][ACROSS * N + 1];
    for (int which = 0; which < 2; which++) {
        W* parts = which ? parts_b : parts_w;
        if (!parts) continue;
        __syncthreads();
#pragma unroll
        for (int k = 0; k < N; k++) sums[threadIdx.y][k * ACROSS + threadIdx.x] = which ? b[k] : w[k];
        __syncthreads();
        for (int c = threadIdx.y; c < N; c += DOWN) {
            W total = 0;
#pragma unroll
            for (int r = 0; r < DOWN; r++) total += sums[r][c * ACROSS + threadIdx.x];
            if (begin + c < n) parts[blockIdx.y * n + begin + c] = total;
        }
    }
}

template <class T>
__global__ void __launch_bounds__(ACROSS * DOWN) column_parts(
    const T* dy, const T* x, const Wide<T>* mean, const Wide<T>* rstd, Wide<T>* parts_w, Wide<T>* parts_b, int64 rows,
    int64 n, int64 piece
) {
    if (aligned<LANES<T>>(dy, n) && aligned<LANES<T>>(x))
        add_piece<T, true>(dy, x, mean, rstd, parts_w, parts_b, rows, n, piece);
    else
        add_piece<T, false>(dy, x, mean, rstd, parts_w, parts_b, rows, n, piece);
}

// total = the sum of the rows of parts (pieces, n), added to what is there if `onto`. A block has 32 columns.
template <class W>
__global__ void __launch_bounds__(ACROSS * DOWN)
    column_sums(const W* parts, W* total, int64 pieces, int64 n, bool onto) {
    const int64 column = int64(blockIdx.x) * ACROSS + threadIdx.x;
    W sum = 0;
    if (column < n)
        for (int64 piece = threadIdx.y; piece < pieces; piece += DOWN) sum += parts[piece * n + column];
    __shared__ W sums[DOWN][ACROSS];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || column >= n) return;
    for (int r = 1; r < DOWN; r++) sum += sums[r][threadIdx.x];
    total[column] = onto ? total[column] + sum : sum;
}
