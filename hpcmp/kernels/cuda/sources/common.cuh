// What the kernels share: numbers of 16 bits, accesses of 16 bytes, sums in a fixed order, random numbers by index.
//
// Compiles with nvcc and with NVRTC (no host headers). Kernels are templates; a source is compiled for the template
// arguments that `declare` in hpcmp/kernels/cuda/launch.py is told of.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef long long int64;  // of every size and index that can pass 2^31

// ---- Numbers: read and written as T, computed and added up as Wide<T>.

template <class T> struct WideOf { using type = float; };
template <> struct WideOf<double> { using type = double; };
template <class T> using Wide = typename WideOf<T>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounded to nearest, once.
template <class T> __device__ inline T narrow(Wide<T> x) { return x; }
template <> __device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float root(float x) { return sqrtf(x); }
__device__ inline double root(double x) { return sqrt(x); }

// ---- Memory: a pack is what a thread moves at once, 16 bytes of one array (or as many numbers of an array beside it).

template <class T> constexpr int LANES = 16 / sizeof(T);

template <class T, int N = LANES<T>> struct alignas(N * sizeof(T)) Pack { T at[N]; };  // N a power of two

// What is moved as one: up to 16 bytes.
template <int BYTES> struct WordOf { using type = uint4; };
template <> struct WordOf<8> { using type = uint2; };
template <> struct WordOf<4> { using type = unsigned; };
template <> struct WordOf<2> { using type = unsigned short; };
template <class P> using Word = typename WordOf<sizeof(P)>::type;

// Whether packs of N numbers can be moved at once from all rows, `stride` numbers apart, of which one begins at p.
template <int N, class T> __device__ inline bool aligned(const T* p, int64 stride = 0) {
    constexpr int64 bytes = N * sizeof(T) < 16 ? N * sizeof(T) : 16;
    return (int64(p) | int64(stride * sizeof(T))) % bytes == 0;
}

// The N numbers from `begin` on of a row of n: at once if `whole` (the place is `aligned`, the row has all of them),
// else one by one, and zero beyond the row's end.
template <class T, int N = LANES<T>>
__device__ inline Pack<T, N> load(const T* row, int64 begin, int64 n, bool whole) {
    Pack<T, N> found;
    if (whole) {
        using W = Word<Pack<T, N>>;
#pragma unroll
        for (int k = 0; k < int(sizeof found / sizeof(W)); k++)
            reinterpret_cast<W*>(&found)[k] = reinterpret_cast<const W*>(row + begin)[k];
        return found;
    }
#pragma unroll
    for (int k = 0; k < N; k++) found.at[k] = begin + k < n ? row[begin + k] : narrow<T>(0);
    return found;
}

// The other way about: what lies beyond the row's end is not written.
template <class T, int N = LANES<T>>
__device__ inline void store(T* row, int64 begin, int64 n, bool whole, const Pack<T, N>& pack) {
    if (whole) {
        using W = Word<Pack<T, N>>;
#pragma unroll
        for (int k = 0; k < int(sizeof pack / sizeof(W)); k++)  // as an assignment it would be cut into small stores
            __stwb(reinterpret_cast<W*>(row + begin) + k, reinterpret_cast<const W*>(&pack)[k]);
        return;
    }
#pragma unroll
    for (int k = 0; k < N; k++)
        if (begin + k < n) row[begin + k] = pack.at[k];
}

// ---- Reductions, always in the same order.

// padding: what a reduction over fewer numbers than 32, of which `one` is one, is filled up with.
struct Add {
    template <class W> __device__ static W of(W a, W b) { return a + b; }
    template <class W> __device__ static W padding(W one) { return 0; }
};
struct Max {
    template <class W> __device__ static W of(W a, W b) { return a < b ? b : a; }
    template <class W> __device__ static W padding(W one) { return one; }
};

// Over the 32 threads of a warp, all of which call it; each gets the result.
template <class Op, class W> __device__ inline W warp_reduce(W value) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) value = Op::of(value, __shfl_xor_sync(0xffffffffu, value, other));
    return value;
}

// Over the threads of a row, which are those of one threadIdx.y: blockDim.x is a multiple of 32, and every thread of
// the block calls it. N numbers at once; each thread gets the results.
template <class Op, int N, class W> __device__ inline void row_reduce(W (&values)[N]) {
    __shared__ W parts[N][32];
    const int warps = blockDim.x / 32, lane = threadIdx.x % 32, first = threadIdx.y * warps;
#pragma unroll
    for (int k = 0; k < N; k++) values[k] = warp_reduce<Op>(values[k]);
    if (warps == 1) return;
    __syncthreads();  // what an earlier call left in `parts` has been read
    if (lane == 0)
#pragma unroll
        for (int k = 0; k < N; k++) parts[k][first + threadIdx.x / 32] = values[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < N; k++)
        values[k] = warp_reduce<Op>(lane < warps ? parts[k][first + lane] : Op::padding(parts[k][first]));
}

template <class W> __device__ inline W row_sum(W value) {
    W values[1] = {value};
    row_reduce<Add>(values);
    return values[0];
}

template <class W> __device__ inline W row_max(W value) {
    W values[1] = {value};
    row_reduce<Max>(values);
    return values[0];
}

// ---- Random numbers by global index: hpcmp/random.py.

__device__ inline uint4 philox(uint4 counter, unsigned key0, unsigned key1) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const unsigned high0 = __umulhi(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
        const unsigned high1 = __umulhi(0xCD9E8D57u, counter.z), low1 = 0xCD9E8D57u * counter.z;
        counter = make_uint4(high1 ^ counter.y ^ key0, low1, high0 ^ counter.w ^ key1, low0);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

// A DropoutMask of fewer than 2^32 rows, made by launch.mask_arguments, which also gives the two words of its key, and the
// arrays i, j and extra (null: no such index).
struct Mask {
    int64 rows[3];                              // the shape of the mask's rows
    int64 strides_i[3], strides_j[3], strides_extra[3];
    int64 extra;                                // that of every row, where there is no array of it
    int64 start[2], first;                      // the columns: `first` from start[0] on, the others from start[1] on
    double factor;                              // 1 / (1 - rate)
    unsigned threshold, unused;
};

struct MaskKey {
    unsigned words[2];

    __device__ inline MaskKey(const int64* key) : words{} {  // null: there is no mask
        if (key) words[0] = unsigned(key[0]), words[1] = unsigned(key[1]);
    }
};

struct MaskRow {
    unsigned i, j, extra;
};

__device__ inline MaskRow mask_row(const Mask& m, const int64* i, const int64* j, const int64* extra, int64 row) {
    const unsigned inner = m.rows[2], middle = m.rows[1], above = unsigned(row) / inner;  // 64-bit divisions are slow
    const int64 c = unsigned(row) - above * inner, a = above / middle, b = above - unsigned(a) * middle;
    const int64 e = extra ? extra[a * m.strides_extra[0] + b * m.strides_extra[1] + c * m.strides_extra[2]] : m.extra;
    return {unsigned(i[a * m.strides_i[0] + b * m.strides_i[1] + c * m.strides_i[2]]),
            unsigned(j[a * m.strides_j[0] + b * m.strides_j[1] + c * m.strides_j[2]]), unsigned(e)};
}

// The words of N columns of a row from `column` (counted over the runs) on: with N a multiple of 4 one draw gives four
// of them, if they lie in one run and begin where a counter does.
template <int N>
__device__ inline void mask_words(unsigned (&words)[N], const Mask& m, MaskKey key, MaskRow row, int64 column) {
    const int64 place = column < m.first ? m.start[0] + column : m.start[1] + column - m.first;
    if (N % 4 == 0 && place % 4 == 0 && (column >= m.first || column + N <= m.first)) {
#pragma unroll
        for (int k = 0; k + 3 < N; k += 4) {
            const uint4 four = philox(make_uint4(row.i, row.j, unsigned(place / 4 + k / 4), row.extra), key.words[0], key.words[1]);
            words[k] = four.x, words[k + 1] = four.y, words[k + 2] = four.z, words[k + 3] = four.w;
        }
        return;
    }
#pragma unroll
    for (int k = 0; k < N; k++) {
        const int64 c = column + k, at = c < m.first ? m.start[0] + c : m.start[1] + c - m.first;
        const uint4 four = philox(make_uint4(row.i, row.j, unsigned(at / 4), row.extra), key.words[0], key.words[1]);
        words[k] = at % 4 == 0 ? four.x : at % 4 == 1 ? four.y : at % 4 == 2 ? four.z : four.w;
    }
}

// ---- Work element by element, on packs of rows: a block has a tile of them (`tiles` in grid.py).

// This thread's packs: U of them from `begin` on, `step` numbers apart, of row `row`. chunks: the tiles of a row.
struct Tile {
    int64 row, start, begin;  // start: of the block's packs
    int step;

    __device__ inline Tile(int lanes, int unroll, unsigned chunks) {
        const unsigned above = blockIdx.x / chunks;
        row = int64(above) * blockDim.y + threadIdx.y;
        step = int(blockDim.x) * lanes;
        start = int64(blockIdx.x - above * chunks) * unroll * step;
        begin = start + threadIdx.x * lanes;
    }

    // Whether each of the block's packs is inside a row of n.
    __device__ inline bool inside(int64 n, int unroll) const { return start + int64(unroll) * step <= n; }
};
