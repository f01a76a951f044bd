// The instructions of sources/attention_*.cuh: cp.async, and ldmatrix and mma.sync m16n8k16 by the layouts of PTX's reference.
#pragma once

// Every second copy is made at once and the others when they are waited for: results show if memory is read before that,
// or is overwritten while it is still read.
struct Copies {
    bool later = false;
    std::vector<std::pair<void*, const void*>> waiting[1024];
};
inline Copies copies;

inline void copy_async(void* to, const void* from) {
    copies.later = !copies.later;
    if (copies.later) copies.waiting[emulation::block.now].push_back({to, from});
    else std::memcpy(to, from, 16);
}
inline void wait_for_copies() {
    for (const auto& [to, from] : copies.waiting[emulation::block.now]) std::memcpy(to, from, 16);
    copies.waiting[emulation::block.now].clear();
}

template <bool TRANSPOSED> inline void load_matrices(unsigned (&to)[4], const void* row) {
    const auto slots = emulation::gather(0xffffffffu, row);
    const int t = emulation::lane();
    for (int m = 0; m < 4; m++) {
        uint16_t both[2];
        for (int k = 0; k < 2; k++) {
            const int r = TRANSPOSED ? t % 4 * 2 + k : t / 4, c = TRANSPOSED ? t / 4 : t % 4 * 2 + k;
            const uint16_t* from;
            std::memcpy(&from, slots[8 * m + r], sizeof from);
            both[k] = from[c];
        }
        std::memcpy(&to[m], both, 4);
    }
}

// a: rows g and g + 8 (registers 0, 1), then the same of columns 8 to 15 (2, 3); b: rows 0 to 7 (b0), 8 to 15 (b1).
template <class T>
inline void multiply(T, float& c0, float& c1, float& c2, float& c3, const unsigned (&a)[4], unsigned b0, unsigned b1) {
    struct Registers { T a[4][2], b[2][2]; } mine;
    std::memcpy(mine.a, a, 16), std::memcpy(mine.b[0], &b0, 4), std::memcpy(mine.b[1], &b1, 4);
    const auto slots = emulation::gather(0xffffffffu, mine);
    const int t = emulation::lane(), g = t / 4;
    float sums[2][2] = {};
    for (int k = 0; k < 16; k++)
        for (int j = 0; j < 2; j++) {
            Registers of_b;
            std::memcpy(&of_b, slots[(t % 4 * 2 + j) * 4 + k % 8 / 2], sizeof of_b);
            for (int i = 0; i < 2; i++) {
                Registers of_a;
                std::memcpy(&of_a, slots[g * 4 + k % 8 / 2], sizeof of_a);
                sums[i][j] += float(of_a.a[k / 8 * 2 + i][k % 2]) * float(of_b.b[k / 8][k % 2]);
            }
        }
    c0 += sums[0][0], c1 += sums[0][1], c2 += sums[1][0], c3 += sums[1][1];
}
