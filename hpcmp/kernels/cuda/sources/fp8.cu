// Numbers of 8 bits: the largest magnitude of a matrix, its codes as it lies and transposed, histories of magnitudes.
// M is the number of bits of a format's mantissa: 3 for E4M3, 2 for E5M2. See hpcmp/kernels/fp8.py.

#include "common.cuh"

constexpr int THREADS = 256, SIDE = 128;  // of a block; rows and columns of its tile
constexpr int UNROLL = 4;                 // packs that a thread of `amax` has in flight

template <int M> constexpr int BIAS = M == 3 ? 7 : 15;
template <int M> constexpr int TOP = M == 3 ? 8 : 15;  // the largest number is 1.75 2^TOP

__device__ inline bool finite(float x) { return (__float_as_uint(x) & 0x7f800000) != 0x7f800000; }

// The largest power of two s with which s `largest` is no larger than the largest number.
template <int M> __device__ inline float scale_for(float largest) {
    const unsigned bits = __float_as_uint(largest);
    int exponent = TOP<M> + 127 - int(bits >> 23) - int((bits & 0x7fffff) > 0x600000);
    exponent = exponent > 60 ? 60 : exponent < -60 ? -60 : exponent;
    return __uint_as_float(unsigned((bits ? exponent : 0) + 127) << 23);
}

// The nearest code, of two the even one, and the largest beyond it. x is no NaN.
template <int M> __device__ inline unsigned round_bits(float x) {
    const unsigned bits = __float_as_uint(x), size = bits & 0x7fffffff, sign = bits >> 24 & 0x80;
    constexpr int shift = 23 - M;
    if (size < unsigned(128 - BIAS<M>) << 23) {  // the step's last bit is the smallest code
        const float step = __uint_as_float(unsigned(127 + 24 - M - BIAS<M>) << 23);
        return sign | (__float_as_uint(__uint_as_float(size) + step) - __float_as_uint(step));
    }
    const unsigned code = ((size + (1u << (shift - 1)) - 1 + (size >> shift & 1)) >> shift) - ((127 - BIAS<M>) << M);
    const unsigned most = M == 3 ? 0x7e : 0x7b;
    return sign | (code < most ? code : most);
}

// Two codes, that of `low` in the lower byte.
template <int M> __device__ inline unsigned round_two(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    unsigned short made;
    if (M == 3) asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(made) : "f"(high), "f"(low));
    else asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(made) : "f"(high), "f"(low));
    return made;
#else
    return round_bits<M>(low) | round_bits<M>(high) << 8;
#endif
}

// largest = the larger of itself and all finite magnitudes, whose order does not matter to a maximum; or what is known.
template <class T>
__global__ void __launch_bounds__(THREADS) amax(const T* x, float* largest, const float* known, int64 n) {
    if (known && *known > 0) {
        if (blockIdx.x == 0 && threadIdx.x == 0) *largest = *known;
        return;
    }
    constexpr int N = LANES<T>;
    const int64 tile = int64(blockDim.x) * N, step = tile * UNROLL;
    const bool whole = aligned<N>(x);
    float most = 0;
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
            for (int k = 0; k < N; k++) {
                const float size = fabsf(widen(packs[u].at[k]));
                if (finite(size)) most = Max::of(most, size);
            }
    }
    most = row_max(most);
    if (threadIdx.x == 0) atomicMax(reinterpret_cast<int*>(largest), __float_as_int(most));  // as ordered as floats >= 0
}

// rows (m, n) and columns (n, m): the codes of x (m, n) and of its transpose; either may be null. A block has a tile,
// and its first thread also writes 1 / scale. record, unless it is null, takes part in `amax`; sums, unless it is null,
// gets a row of sums of each row of tiles.
//
// A thread turns packs of four rows into words of four codes that lie below each other. Word g of a tile's column c is at
// place (g + c / N * N / 4) % 32 of it: the 32 words that a warp writes, of neighbouring packs, are in 32 banks, as are
// those of one column, which it then reads.
template <class T, int M> __global__ void __launch_bounds__(THREADS, 4) quantise(
    const T* x, const float* largest, unsigned char* rows, unsigned char* columns, float* inverse, float* record,
    float* sums, int64 m, int64 n
) {
    constexpr int N = LANES<T>, PACKS = SIDE / N;
    __shared__ unsigned turned[SIDE][SIDE / 4];
    const float scale = scale_for<M>(*largest);
    const int64 across = (n + SIDE - 1) / SIDE, top = blockIdx.x / across * SIDE, left = blockIdx.x % across * SIDE;
    const bool whole = aligned<N>(x, n), whole_rows = aligned<N>(rows, n), whole_columns = aligned<4>(columns, m);
    float most = 0, total[N] = {};  // total: of the thread's columns, for it has the same of every piece
    for (int piece = threadIdx.x; piece < SIDE / 4 * PACKS; piece += THREADS) {
        const int group = piece / PACKS, pack = piece % PACKS;
        const int64 row = top + 4 * group, column = left + pack * N;
        const bool inside = column + N <= n;
        Pack<T> packs[4];
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const bool here = row + r < m;
            packs[r] = load(x + (row + r) * n, column, here ? n : 0, here && whole && inside);
        }
        Pack<unsigned char, N> codes[4];
#pragma unroll
        for (int r = 0; r < 4; r++) {
#pragma unroll
            for (int k = 0; k < N; k += 2) {
                const float a = widen(packs[r].at[k]), b = widen(packs[r].at[k + 1]);
                const unsigned two = round_two<M>(finite(a) ? a * scale : 0.0f, finite(b) ? b * scale : 0.0f);
                codes[r].at[k] = finite(a) ? two : 0x7f;
                codes[r].at[k + 1] = finite(b) ? two >> 8 : 0x7f;
                if (finite(a)) most = Max::of(most, fabsf(a));
                if (finite(b)) most = Max::of(most, fabsf(b));
                total[k] += a;
                total[k + 1] += b;
            }
            if (rows && row + r < m) store(rows + (row + r) * n, column, n, whole_rows && inside, codes[r]);
        }
        if (columns)
#pragma unroll
            for (int k = 0; k < N; k++)
                turned[pack * N + k][(group + pack * (N / 4)) % 32] =
                    codes[0].at[k] | codes[1].at[k] << 8 | codes[2].at[k] << 16 | unsigned(codes[3].at[k]) << 24;
    }
    if (columns) {
        __syncthreads();
        const int lane = threadIdx.x % 32;
        const int64 row = top + 4 * lane;
        for (int c = threadIdx.x / 32; c < SIDE && left + c < n; c += THREADS / 32) {
            const unsigned word = turned[c][(lane + c / N * (N / 4)) % 32];
            unsigned char* column = columns + (left + c) * m;
            if (whole_columns && row + 4 <= m) __stwb(reinterpret_cast<unsigned*>(column + row), word);
            else
                for (int r = 0; r < 4 && row + r < m; r++) column[row + r] = word >> 8 * r;
        }
    }
    if (sums) {
        constexpr int PARTS = THREADS / PACKS;
        float (&parts)[PARTS][SIDE] = reinterpret_cast<float (&)[PARTS][SIDE]>(turned);
        static_assert(sizeof(parts) <= sizeof(turned));
        __syncthreads();
#pragma unroll
        for (int k = 0; k < N; k++) parts[threadIdx.x / PACKS][threadIdx.x % PACKS * N + k] = total[k];
        __syncthreads();
        if (threadIdx.x < SIDE && left + threadIdx.x < n) {
            float sum = 0;
#pragma unroll
            for (int i = 0; i < PARTS; i++) sum += parts[i][threadIdx.x];
            sums[top / SIDE * n + left + threadIdx.x] = sum;
        }
    }
    if (record) {
        most = row_max(most);
        if (threadIdx.x == 0) atomicMax(reinterpret_cast<int*>(record), __float_as_int(most));
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) *inverse = 1 / scale;
}

// y = the numbers that codes stand for, over the scale: exact in T, which has the exponents of float.
template <class T, int M>
__global__ void __launch_bounds__(THREADS) dequantise(const unsigned char* codes, const float* inverse, T* y, int64 n) {
    constexpr int N = LANES<T>;
    const float smallest = __uint_as_float(unsigned(128 - BIAS<M> - M) << 23), scale = *inverse;
    const int64 at = (int64(blockIdx.x) * THREADS + threadIdx.x) * N;
    const bool inside = at + N <= n;
    const Pack<unsigned char, N> pack = load<unsigned char, N>(codes, at, n, aligned<N>(codes) && inside);
    Pack<T> made;
#pragma unroll
    for (int k = 0; k < N; k++) {
        const unsigned size = pack.at[k] & 0x7f;
        // Nowhere a float that is subnormal: CuPy has them read as zero (-ftz=true).
        float value = size >> M ? __uint_as_float((size << (23 - M)) + (unsigned(127 - BIAS<M>) << 23)) : size * smallest;
        value *= scale;
        if (size > (M == 3 ? 0x7e : 0x7c)) value = __uint_as_float(0x7fc00000);
        else if (M == 2 && size == 0x7c) value = __uint_as_float(0x7f800000);
        made.at[k] = narrow<T>(pack.at[k] & 0x80 ? -value : value);
    }
    store(y, at, n, aligned<N>(y) && inside, made);
}

// A thread moves the history of a tensor on; see hpcmp/kernels/fp8.py.
__global__ void __launch_bounds__(THREADS) shift_history(
    float* history, float* largest, const float* seen, const double* factor, int64 tensors, int64 steps
) {
    const int64 tensor = int64(blockIdx.x) * THREADS + threadIdx.x;
    if (tensor >= tensors || *factor != *factor) return;  // NaN
    float next = seen[tensor], most = 0;
    for (float* at = history + tensor * steps; at < history + (tensor + 1) * steps; at++) {
        const float old = *at;
        *at = next;
        most = Max::of(most, next);
        next = old;
    }
    largest[tensor] = most;
}
