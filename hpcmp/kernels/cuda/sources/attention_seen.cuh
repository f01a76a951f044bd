// What attention.cu's kernels leave out of the scores: the keys that a query does not see, and what dropout drops.

#include "common.cuh"

// The keys that a query sees: so many, from the first on.
struct Seen {
    int first;
    unsigned count;
    __device__ bool has(int key) const { return unsigned(key - first) < count; }
};

__device__ inline Seen seen_by(const int* first_key, int query, int end) {
    const int first = first_key ? first_key[query] : 0;
    return {first, unsigned(max(end - first, 0))};
}

// Where the tile of columns begins that holds the first key which the query sees, and those after it.
__device__ inline int first_tile(const int* first_key, int query, int t, int columns) {
    return first_key ? min(t, first_key[query]) / columns * columns : 0;
}

// How many queries, from the first on, see a key before `end`.
__device__ inline int queries_before(const int* first_key, int s, int end) {
    if (!first_key) return s;
    int low = 0, high = s;
    while (low < high) {
        const int middle = (low + high) / 2;
        first_key[middle] < end ? low = middle + 1 : high = middle;
    }
    return low;
}

// A row of the mask, whose rows are (sample, head, query).
__device__ inline MaskRow drawn_row(const Mask& m, const int64* i, const int64* j, const int64* extra, int64 sample,
                                    int64 head, int64 query) {
    const auto place = [&](const int64 (&strides)[3]) { return sample * strides[0] + head * strides[1] + query * strides[2]; };
    return {unsigned(i[place(m.strides_i)]), unsigned(j[place(m.strides_j)]),
            unsigned(extra ? extra[place(m.strides_extra)] : m.extra)};
}
