// Tiles of queries and keys in shared memory and their products in registers: what the kernels of attention.cu do it with.
//
// A block is four warps. A row of a product belongs to MEMBERS neighbouring threads, which share out its columns; so a
// warp holds GROUPS rows at once, and ROWS times as many in all. There are two engines: Fma for float and double, and Mma
// (attention_mma.cuh), the tensor cores' products of 16-bit numbers. What an engine says:
//   row(i), column(j)            which of the block's rows and the tile's columns a thread's x[i][j] is: ROWS rows and RUN
//                                columns that follow each other, so that one draw of a dropout mask gives several
//   row_slot(r), column_slot(c)  where in its tile a row or a column lies: it is read from there without bank conflicts
//   depth(j)                     which number of its row a thread's out[i][j] is: PACK of them follow each other
//   dot                          x = rows columns^T over d numbers
//   accumulate                   out += x tile, of d numbers a row

#include "common.cuh"

template <class T, int D, int ROWS_, int MEMBERS_, int COLUMNS_> struct Layout {
    static constexpr int ROWS = ROWS_, MEMBERS = MEMBERS_, COLUMNS = COLUMNS_, GROUPS = 32 / MEMBERS;
    static constexpr int WARP_ROWS = ROWS * GROUPS, BLOCK_ROWS = 4 * WARP_ROWS;
    static constexpr int C = COLUMNS / MEMBERS, W = D / MEMBERS;  // columns of a product, and numbers of a row, a thread
    static constexpr int RUN = C < 4 ? C : 4;
    static constexpr int STEP = D + LANES<T>;  // 16 bytes more than a row: rows that follow begin four banks apart
    using Product = Wide<T>[ROWS][C];
    using Rows = Wide<T>[ROWS][W];

    __device__ static int lane() { return threadIdx.x % 32; }
    __device__ static int group() { return lane() / MEMBERS; }
    __device__ static int member() { return lane() % MEMBERS; }
    __device__ static int warp_row() { return int(threadIdx.x) / 32 * WARP_ROWS; }
    __device__ static int row(int i) { return warp_row() + group() * ROWS + i; }
    __device__ static int row_slot(int r) { return r / WARP_ROWS * WARP_ROWS + r % WARP_ROWS / ROWS + r % ROWS * GROUPS; }
    __device__ static int column(int j) { return j / RUN * RUN * MEMBERS + member() * RUN + j % RUN; }

    // Over the threads of a row.
    template <class Op> __device__ static Wide<T> reduce(Wide<T> value) {
#pragma unroll
        for (int other = MEMBERS / 2; other > 0; other /= 2)
            value = Op::of(value, __shfl_xor_sync(0xffffffffu, value, other));
        return value;
    }
};

#ifdef __CUDACC__
// 16 bytes to shared memory, without passing through registers; they are there after copies_done.
__device__ inline void copy_async(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(to))), "l"(from) : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#else
#include <tensor_cores.h>  // the same on a CPU, and the instructions of attention_mma.cuh: tests/kernels/emulation
#endif

// The copies of all threads are there, and no thread still reads what they may overwrite from now on.
__device__ inline void copies_done() {
    wait_for_copies();
    __syncthreads();
}

// Begins to copy rows [first, first + COUNT) of x, `step` numbers apart, to their slots; zeros beyond row `rows` and
// number d.
template <class T, int D, int COUNT, class Slot>
__device__ inline void load_tile(T* tile, const T* x, int64 step, int first, int rows, int d, Slot slot) {
    constexpr int N = LANES<T>, PACKS = D / N, STEP = D + N;
    const bool whole = aligned<N>(x, step);
    for (int i = threadIdx.x; i < COUNT * PACKS; i += blockDim.x) {
        const int row = i / PACKS, begin = i % PACKS * N, here = first + row < rows ? d : 0;
        const T* from = x + (first + row) * step;
        T* to = tile + slot(row) * STEP + begin;
        if (whole && begin + N <= here) {
            copy_async(to, from + begin);
        } else {
            const Pack<T> pack = load(from, begin, here, false);
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&pack);
        }
    }
}

template <class E, int D, class T>
__device__ inline void load_rows(T* tile, const T* x, int64 step, int first, int rows, int d) {
    load_tile<T, D, E::BLOCK_ROWS>(tile, x, step, first, rows, d, [](int r) { return E::row_slot(r); });
}

template <class E, int D, class T>
__device__ inline void load_columns(T* tile, const T* x, int64 step, int first, int rows, int d) {
    load_tile<T, D, E::COLUMNS>(tile, x, step, first, rows, d, [](int c) { return E::column_slot(c); });
}

// y's rows = out times a factor for each.
template <class E, class T>
__device__ inline void store_rows(T* y, int64 step, int first, int rows, int d, const typename E::Rows& out,
                                  const Wide<T> (&factor)[E::ROWS]) {
    constexpr int N = E::PACK;
    const bool whole = aligned<N>(y, step);
#pragma unroll
    for (int i = 0; i < E::ROWS; i++) {
        const int row = first + E::row(i);
        if (row >= rows) continue;
#pragma unroll
        for (int j = 0; j < E::W; j += N) {
            Pack<T, N> pack;
#pragma unroll
            for (int k = 0; k < N; k++) pack.at[k] = narrow<T>(out[i][j + k] * factor[i]);
            store(y + row * step, E::depth(j), d, whole && E::depth(j) + N <= d, pack);
        }
    }
}

// Products by fused multiply-adds.
template <class T, int D, int ROWS, int MEMBERS, int COLUMNS> struct Fma : Layout<T, D, ROWS, MEMBERS, COLUMNS> {
    using L = Layout<T, D, ROWS, MEMBERS, COLUMNS>;
    static constexpr int PACK = LANES<T>;

    __device__ static int column_slot(int c) {
        return c / (L::RUN * MEMBERS) * L::RUN * MEMBERS + c % L::RUN * MEMBERS + c / L::RUN % MEMBERS;
    }
    __device__ static int depth(int j) { return j / PACK * PACK * MEMBERS + L::member() * PACK + j % PACK; }

    __device__ static void dot(typename L::Product& x, const T* rows, const T* columns, int d) {
        rows += (L::warp_row() + L::group()) * L::STEP;
        columns += L::member() * L::STEP;
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int j = 0; j < L::C; j++) x[i][j] = 0;
        for (int k = 0; k < d; k += PACK) {
            Pack<T> a[ROWS];
#pragma unroll
            for (int i = 0; i < ROWS; i++) a[i] = load(rows + i * L::GROUPS * L::STEP, k, D, true);
#pragma unroll
            for (int j = 0; j < L::C; j++) {
                const Pack<T> b = load(columns + j * MEMBERS * L::STEP, k, D, true);
#pragma unroll
                for (int i = 0; i < ROWS; i++)
#pragma unroll
                    for (int v = 0; v < PACK; v++) x[i][j] += a[i].at[v] * b.at[v];
            }
        }
    }

    __device__ static void accumulate(typename L::Rows& out, const typename L::Product& x, const T* tile, int d) {
#pragma unroll
        for (int j = 0; j < L::C; j++)
            for (int other = 0; other < MEMBERS; other++) {
                const T* from = tile + (j * MEMBERS + other) * L::STEP;
                T weight[ROWS];
#pragma unroll
                for (int i = 0; i < ROWS; i++)
                    weight[i] = __shfl_sync(0xffffffffu, x[i][j], L::lane() - L::member() + other);
#pragma unroll
                for (int part = 0; part < L::W; part += PACK) {
                    if (part * MEMBERS >= d) break;
                    const Pack<T> b = load(from, depth(part), D, true);
#pragma unroll
                    for (int i = 0; i < ROWS; i++)
#pragma unroll
                        for (int v = 0; v < PACK; v++) out[i][part + v] += weight[i] * b.at[v];
                }
            }
    }
};
