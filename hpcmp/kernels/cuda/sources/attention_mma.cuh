// The engine of attention.cu for 16-bit numbers: tensor cores, by mma.sync m16n8k16 (compute capability 8.0 on), with sums
// in float. A product's columns, still in the registers that it was made in, are the rows of the next product's operand:
// probabilities never pass through memory.

#include "attention_tiles.cuh"

#ifdef __CUDACC__
// Four 8 x 8 matrices from shared memory: threads 8m to 8m + 7 give the addresses of the rows of matrix m, and thread t
// gets of each the numbers 2 (t % 4) and the next of row t / 4, or, transposed, of column t / 4.
template <bool TRANSPOSED> __device__ inline void load_matrices(unsigned (&to)[4], const void* row) {
    const unsigned from = unsigned(__cvta_generic_to_shared(row));
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}

// c (16 x 8) += a (16 x 16) b (16 x 8): thread t has columns 2 (t % 4) and the next of rows t / 4 (c0, c1) and t / 4 + 8.
__device__ inline void multiply(__half, float& c0, float& c1, float& c2, float& c3, const unsigned (&a)[4], unsigned b0,
                                unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply(__nv_bfloat16, float& c0, float& c1, float& c2, float& c3, const unsigned (&a)[4],
                                unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// Two numbers in one register, the first in its lower half.
template <class T> __device__ inline unsigned pair(float first, float second) {
    Pack<T, 2> both;
    both.at[0] = narrow<T>(first), both.at[1] = narrow<T>(second);
    return *reinterpret_cast<const unsigned*>(&both);
}

// Rows i and columns j of a Product, or numbers j of Rows: mma's tile (i / 2, j / 2), its registers 2 (i % 2) + j % 2.
template <class T, int D, int ROWS, int COLUMNS> struct Mma : Layout<T, D, ROWS, 4, COLUMNS> {
    using L = Layout<T, D, ROWS, 4, COLUMNS>;
    static constexpr int PACK = 2;

    __device__ static int column_slot(int c) { return c / 16 * 16 + c % 4 / 2 * 8 + c % 16 / 4 * 2 + c % 2; }
    __device__ static int depth(int j) { return j / 2 * 8 + L::member() * 2 + j % 2; }

    __device__ static void dot(typename L::Product& x, const T* rows, const T* columns, int d) {
        const int r = L::lane() % 8, odd = L::lane() / 8 % 2 * 8, high = L::lane() / 16 * 8;
        rows += (L::warp_row() + r + odd) * L::STEP + high;
        columns += (r + high) * L::STEP + odd;
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int j = 0; j < L::C; j++) x[i][j] = 0;
        for (int k = 0; k < d; k += 16) {
            unsigned a[ROWS / 2][4];
#pragma unroll
            for (int m = 0; m < ROWS / 2; m++) load_matrices<false>(a[m], rows + m * 16 * L::STEP + k);
#pragma unroll
            for (int c = 0; c < COLUMNS / 16; c++) {
                unsigned b[4];
                load_matrices<false>(b, columns + c * 16 * L::STEP + k);
#pragma unroll
                for (int m = 0; m < ROWS / 2; m++) add(x, m, c, a[m], b);
            }
        }
    }

    __device__ static void accumulate(typename L::Rows& out, const typename L::Product& x, const T* tile, int d) {
        const int r = L::lane() % 8, odd = L::lane() / 8 % 2 * 8, high = L::lane() / 16 * 8;
        tile += (r + odd) * L::STEP + high;
#pragma unroll
        for (int c = 0; c < COLUMNS / 16; c++) {
            unsigned a[ROWS / 2][4];
#pragma unroll
            for (int m = 0; m < ROWS / 2; m++)
#pragma unroll
                for (int k = 0; k < 4; k++)
                    a[m][k] = pair<T>(x[2 * m + k % 2][4 * c + k / 2 * 2], x[2 * m + k % 2][4 * c + k / 2 * 2 + 1]);
#pragma unroll
            for (int e = 0; e < D / 16; e++) {
                if (16 * e >= d) break;
                unsigned b[4];
                load_matrices<true>(b, tile + c * 16 * L::STEP + e * 16);
#pragma unroll
                for (int m = 0; m < ROWS / 2; m++) add(out, m, e, a[m], b);
            }
        }
    }

    // The 16 columns from 16 c on of the 16 rows of tile m.
    template <int N> __device__ static void add(float (&x)[ROWS][N], int m, int c, const unsigned (&a)[4], const unsigned (&b)[4]) {
        float(&low)[N] = x[2 * m], (&high)[N] = x[2 * m + 1];
        multiply(T(), low[4 * c], low[4 * c + 1], high[4 * c], high[4 * c + 1], a, b[0], b[1]);
        multiply(T(), low[4 * c + 2], low[4 * c + 3], high[4 * c + 2], high[4 * c + 3], a, b[2], b[3]);
    }
};
