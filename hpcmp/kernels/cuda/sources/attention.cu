// Attention in tiles, forward and backward: scores and probabilities are in registers alone, never in memory.
//
// Dao, "FlashAttention-2", 2023, algorithms 1 and 2, without atomics: the gradient of the queries has a kernel of its own,
// and that of the keys and values sums over the query heads of its group, and their queries, in order. So the bits are the
// same in every run. Exponentials are of base 2.
//
// first_key, if not null, has of each sample and query, (batch, s), the first key that it sees; it does not fall from a
// query to the next, so that tiles of keys and queries that do not see each other are left out.

#include "attention_mma.cuh"
#include "attention_seen.cuh"

// By attention.py. Strides, in numbers: of a position, a sample and a head; o, dq and dkv are contiguous, and so are lse
// and delta, of (batch, heads, s).
struct Problem {
    int64 s, t, batch, heads, groups, d;  // groups: key-value heads, each read by heads / groups query heads
    int64 causal, dropped;
    int64 q[3], kv[3], o[3], d_o[3];
};

template <class T, int D, int ROWS, int MEMBERS, int COLUMNS, bool HALF = sizeof(T) == 2> struct EngineOf {
    using type = Fma<T, D, ROWS, MEMBERS, COLUMNS>;
};
template <class T, int D, int ROWS, int MEMBERS, int COLUMNS> struct EngineOf<T, D, ROWS, MEMBERS, COLUMNS, true> {
    using type = Mma<T, D, ROWS, COLUMNS>;
};

extern __shared__ __align__(16) unsigned char dynamic_shared[];

#ifdef __CUDACC__
__device__ inline float power(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // to two units in the last place, as exp2f, in one instruction
    return y;
}
#else
inline float power(float x) { return exp2f(x); }
#endif
__device__ inline double power(double x) { return exp2(x); }
__device__ inline float logarithm(float x) { return log2f(x); }
__device__ inline double logarithm(double x) { return log2(x); }

constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;
constexpr float LEAST = -3e38f;  // a score that is not there: finite, since LEAST - LEAST is to be a number

template <class T> __device__ inline T* at(T* x, const int64 (&strides)[3], int64 sample, int64 head) {
    return x + sample * strides[1] + head * strides[2];
}

// Which rows of the grid's first axis a block has: where a query sees the keys up to its own, the longest begin first.
__device__ inline int first_row(int rows, bool last_first) {
    return (last_first ? gridDim.x - 1 - blockIdx.x : blockIdx.x) * rows;
}

#define ATTENTION                                                                                   \
    using E = typename EngineOf<T, D, ROWS, MEMBERS, COLUMNS>::type;                                \
    using A = Wide<T>;                                                                              \
    const int s = p.s, t = p.t, d = p.d, shared_by = p.heads / p.groups;                            \
    const int64 sample = blockIdx.z;                                                                \
    const MaskKey key(mask_key);                                                                    \
    if (first_key) first_key += sample * s;

// o and lse. Grid: blocks of queries, heads, samples.
template <class T, int D, int ROWS, int MEMBERS, int COLUMNS>
__global__ void __launch_bounds__(128)
    attention_forward(Problem p, const T* q, const T* k, const T* v, T* o, Wide<T>* lse, const int* first_key,
                      double scale, Mask mask, const int64* mask_key, const int64* mask_i, const int64* mask_j,
                      const int64* mask_extra) {
    ATTENTION
    T* const queries = reinterpret_cast<T*>(dynamic_shared);
    T* const keys = queries + E::BLOCK_ROWS * E::STEP;
    T* const values = keys + COLUMNS * E::STEP;
    const int head = blockIdx.y, first = first_row(E::BLOCK_ROWS, p.causal);
    const int end = p.causal ? min(t, first + E::BLOCK_ROWS) : t, start = first_tile(first_key, first, t, COLUMNS);
    const int64 row0 = (sample * p.heads + head) * s;
    const A factor = A(scale * LOG2E);
    k = at(k, p.kv, sample, head / shared_by), v = at(v, p.kv, sample, head / shared_by);
    load_rows<E, D>(queries, at(q, p.q, sample, head), p.q[0], first, s, d);

    typename E::Rows out;
    A top[ROWS], total[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        top[i] = LEAST, total[i] = 0;
#pragma unroll
        for (int j = 0; j < E::W; j++) out[i][j] = 0;
    }
    load_columns<E, D>(keys, k, p.kv[0], start, t, d);
    for (int begin = start; begin < end; begin += COLUMNS) {
        copies_done();
        load_columns<E, D>(values, v, p.kv[0], begin, t, d);
        typename E::Product x;
        E::dot(x, queries, keys, d);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int query = min(first + E::row(i), s - 1);
            const Seen seen = seen_by(first_key, query, p.causal ? query + 1 : t);
            A most = top[i];
#pragma unroll
            for (int j = 0; j < E::C; j++) {
                x[i][j] = seen.has(begin + E::column(j)) ? x[i][j] * factor : A(LEAST);
                most = Max::of(most, x[i][j]);
            }
            most = E::template reduce<Max>(most);
            const A shrink = power(top[i] - most);
            A sum = 0;
#pragma unroll
            for (int j = 0; j < E::C; j++) sum += x[i][j] = power(x[i][j] - most);
            total[i] = total[i] * shrink + E::template reduce<Add>(sum);
            top[i] = most;
#pragma unroll
            for (int j = 0; j < E::W; j++) out[i][j] *= shrink;
            if (!p.dropped) continue;
            const MaskRow drawn = drawn_row(mask, mask_i, mask_j, mask_extra, sample, head, query);
#pragma unroll
            for (int j = 0; j < E::C; j += E::RUN) {
                unsigned words[E::RUN];
                mask_words(words, mask, key, drawn, begin + E::column(j));
#pragma unroll
                for (int run = 0; run < E::RUN; run++)
                    if (words[run] < mask.threshold) x[i][j + run] = 0;
            }
        }
        copies_done();
        if (begin + COLUMNS < end) load_columns<E, D>(keys, k, p.kv[0], begin + COLUMNS, t, d);
        E::accumulate(out, x, values, d);
    }
    wait_for_copies();  // of a block whose queries see no key
    A scaled[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int row = first + E::row(i);
        if (top[i] <= A(LEAST)) total[i] = 0;  // it sees no key: what stands there are keys that are not seen
        scaled[i] = total[i] == 0 ? A(0) : (p.dropped ? A(mask.factor) : A(1)) / total[i];
        if (row < s && E::member() == 0) lse[row0 + row] = (top[i] + logarithm(total[i])) * A(LN2);
    }
    const int64 step = p.batch * p.heads * d;
    store_rows<E>(o + (sample * p.heads + head) * d, step, first, s, d, out, scaled);
}

// delta = rowsum(do o), of (batch, heads, s). A row of the block's threads, a power of two up to 32, takes a row.
template <class T>
__global__ void __launch_bounds__(256) attention_delta(Problem p, const T* d_o, const T* o, Wide<T>* delta) {
    constexpr int N = LANES<T>;
    const unsigned s = p.s, heads = p.heads, rows = p.batch * heads * s;
    const unsigned mine = blockIdx.x * blockDim.y + threadIdx.y, row = min(mine, rows - 1);
    const T* x = at(d_o, p.d_o, row / s / heads, row / s % heads) + row % s * p.d_o[0];
    const T* y = at(o, p.o, row / s / heads, row / s % heads) + row % s * p.o[0];
    const bool all = aligned<N>(x) && aligned<N>(y);
    Wide<T> sum = 0;
    for (int begin = threadIdx.x * N; begin < p.d; begin += blockDim.x * N) {
        const bool whole = all && begin + N <= p.d;
        const Pack<T> a = load(x, begin, p.d, whole), b = load(y, begin, p.d, whole);
#pragma unroll
        for (int k = 0; k < N; k++) sum += widen(a.at[k]) * widen(b.at[k]);
    }
    for (int other = blockDim.x / 2; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    if (mine < rows && threadIdx.x == 0) delta[row] = sum;
}

// dq. Grid: blocks of queries, heads, samples.
template <class T, int D, int ROWS, int MEMBERS, int COLUMNS>
__global__ void __launch_bounds__(128)
    attention_backward_queries(Problem p, const T* q, const T* k, const T* v, const T* d_o, const Wide<T>* lse,
                               const Wide<T>* delta, T* dq, const int* first_key, double scale, Mask mask,
                               const int64* mask_key, const int64* mask_i, const int64* mask_j,
                               const int64* mask_extra) {
    ATTENTION
    T* const queries = reinterpret_cast<T*>(dynamic_shared);
    T* const gradients = queries + E::BLOCK_ROWS * E::STEP;
    T* const keys = gradients + E::BLOCK_ROWS * E::STEP;
    T* const values = keys + COLUMNS * E::STEP;
    const int head = blockIdx.y, first = first_row(E::BLOCK_ROWS, p.causal);
    const int end = p.causal ? min(t, first + E::BLOCK_ROWS) : t, start = first_tile(first_key, first, t, COLUMNS);
    const int64 row0 = (sample * p.heads + head) * s;
    const A factor = A(scale * LOG2E), keep = p.dropped ? A(mask.factor) : A(1);
    k = at(k, p.kv, sample, head / shared_by), v = at(v, p.kv, sample, head / shared_by);
    load_rows<E, D>(queries, at(q, p.q, sample, head), p.q[0], first, s, d);
    load_rows<E, D>(gradients, at(d_o, p.d_o, sample, head), p.d_o[0], first, s, d);

    typename E::Rows out;
    A level[ROWS], mean[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int query = min(first + E::row(i), s - 1);
        level[i] = lse[row0 + query] * A(LOG2E), mean[i] = delta[row0 + query];
#pragma unroll
        for (int j = 0; j < E::W; j++) out[i][j] = 0;
    }
    load_columns<E, D>(values, v, p.kv[0], start, t, d);
    for (int begin = start; begin < end; begin += COLUMNS) {
        copies_done();
        load_columns<E, D>(keys, k, p.kv[0], begin, t, d);
        typename E::Product x, dx;
        E::dot(dx, gradients, values, d);
        copies_done();
        if (begin + COLUMNS < end) load_columns<E, D>(values, v, p.kv[0], begin + COLUMNS, t, d);
        E::dot(x, queries, keys, d);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int query = min(first + E::row(i), s - 1);
            const Seen seen = seen_by(first_key, query, p.causal ? query + 1 : t);
            MaskRow drawn;
            if (p.dropped) drawn = drawn_row(mask, mask_i, mask_j, mask_extra, sample, head, query);
#pragma unroll
            for (int j = 0; j < E::C; j += E::RUN) {
                unsigned words[E::RUN];
                if (p.dropped) mask_words(words, mask, key, drawn, begin + E::column(j));
#pragma unroll
                for (int run = 0; run < E::RUN; run++) {
                    const A weight = seen.has(begin + E::column(j + run)) ? power(x[i][j + run] * factor - level[i]) : A(0);
                    const A kept = p.dropped && words[run] < mask.threshold ? A(0) : keep;
                    x[i][j + run] = weight * (dx[i][j + run] * kept - mean[i]);
                }
            }
        }
        E::accumulate(out, x, keys, d);
    }
    wait_for_copies();
    A scaled[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) scaled[i] = A(scale);
    store_rows<E>(dq + (sample * p.heads + head) * d, p.batch * p.heads * d, first, s, d, out, scaled);
}

// dkv (t, batch, groups, 2, d). Grid: blocks of keys, key-value heads, samples. A product's rows are keys here, its columns
// queries.
template <class T, int D, int ROWS, int MEMBERS, int COLUMNS>
__global__ void __launch_bounds__(128)
    attention_backward_keys(Problem p, const T* q, const T* k, const T* v, const T* d_o, const Wide<T>* lse,
                            const Wide<T>* delta, T* dkv, const int* first_key, double scale, Mask mask,
                            const int64* mask_key, const int64* mask_i, const int64* mask_j,
                            const int64* mask_extra) {
    ATTENTION
    constexpr int RUN = ROWS < 4 ? ROWS : 4;  // keys of a thread that follow each other
    T* const keys = reinterpret_cast<T*>(dynamic_shared);
    T* const values = keys + E::BLOCK_ROWS * E::STEP;
    T* const queries = values + E::BLOCK_ROWS * E::STEP;
    T* const gradients = queries + COLUMNS * E::STEP;
    const int group = blockIdx.y, first = first_row(E::BLOCK_ROWS, false);
    const int start = p.causal ? first / COLUMNS * COLUMNS : 0;
    const int end = queries_before(first_key, s, min(t, first + E::BLOCK_ROWS));
    const A factor = A(scale * LOG2E), keep = p.dropped ? A(mask.factor) : A(1);
    load_rows<E, D>(keys, at(k, p.kv, sample, group), p.kv[0], first, t, d);
    load_rows<E, D>(values, at(v, p.kv, sample, group), p.kv[0], first, t, d);

    typename E::Rows dk, dv;
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int j = 0; j < E::W; j++) dk[i][j] = dv[i][j] = 0;
    for (int head = group * shared_by; head < (group + 1) * shared_by; head++) {
        const int64 row0 = (sample * p.heads + head) * s;
        const T* q_head = at(q, p.q, sample, head);
        const T* d_o_head = at(d_o, p.d_o, sample, head);
        if (start < end) load_columns<E, D>(gradients, d_o_head, p.d_o[0], start, s, d);
        for (int begin = start; begin < end; begin += COLUMNS) {
            copies_done();
            load_columns<E, D>(queries, q_head, p.q[0], begin, s, d);
            typename E::Product x, dx;
            E::dot(dx, values, gradients, d);
            copies_done();
            E::dot(x, keys, queries, d);
#pragma unroll
            for (int j = 0; j < E::C; j++) {
                const int column = begin + E::column(j), query = min(column, s - 1);
                const A level = lse[row0 + query] * A(LOG2E), mean = delta[row0 + query];
                const Seen seen = seen_by(first_key, query, column < s ? p.causal ? query + 1 : t : 0);
                MaskRow drawn;
                if (p.dropped) drawn = drawn_row(mask, mask_i, mask_j, mask_extra, sample, head, query);
#pragma unroll
                for (int i = 0; i < ROWS; i += RUN) {
                    unsigned words[RUN];
                    if (p.dropped) mask_words(words, mask, key, drawn, first + E::row(i));
#pragma unroll
                    for (int run = 0; run < RUN; run++) {
                        const A weight = seen.has(first + E::row(i + run)) ? power(x[i + run][j] * factor - level) : A(0);
                        const A kept = p.dropped && words[run] < mask.threshold ? A(0) : keep;
                        x[i + run][j] = weight * kept;
                        dx[i + run][j] = weight * (dx[i + run][j] * kept - mean);
                    }
                }
            }
            E::accumulate(dv, x, gradients, d);
            __syncthreads();
            if (begin + COLUMNS < end) load_columns<E, D>(gradients, d_o_head, p.d_o[0], begin + COLUMNS, s, d);
            E::accumulate(dk, dx, queries, d);
        }
    }
    wait_for_copies();
    A scaled[ROWS], same[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) scaled[i] = A(scale), same[i] = 1;
    dkv += (sample * p.groups + group) * 2 * d;
    store_rows<E>(dkv, p.batch * p.groups * 2 * d, first, t, d, dk, scaled);
    store_rows<E>(dkv + d, p.batch * p.groups * 2 * d, first, t, d, dv, same);
}
