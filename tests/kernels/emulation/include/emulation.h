// CUDA kernels on one thread of the CPU, included before a source of hpcmp/kernels/cuda/sources.
//
// The threads of a block are fibers that run one after the other and change places at barriers and shuffles, so that
// these mean what they mean on a GPU; each warp runs as far ahead of the others as barriers let it, so that a missing
// one shows. Blocks run in the order of their indices. A launch ends in an error when a thread touches memory that is
// not its arrays', moves several numbers at once from or to an address that is no multiple of their size or goes beyond an
// array of its own, when threads wait for others that never come, and when a kernel writes beyond the dynamic shared
// memory that it was given.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ thread_local  // of the only thread: static inside a function, and valid after "extern"

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

constexpr size_t SHARED = 232448;  // what a block of sm_90 can have

// Dynamic shared memory: sources declare `extern __shared__ __align__(16) unsigned char dynamic_shared[];`.
alignas(128) thread_local unsigned char dynamic_shared[SHARED];

namespace emulation {

constexpr size_t STACK = 1 << 18, SLOT = 128;
enum Outcome { DONE, OUTSIDE, DEADLOCK, SHARED_OVERRUN, MISALIGNED };

struct Barrier { int arrived = 0; long generation = 0; };

struct Meeting {  // of the lanes of a mask, for shuffles: what each brings, in turns
    unsigned mask;
    Barrier barrier;
    alignas(16) unsigned char slots[2][32][SLOT];
    int turn[32] = {};
};

struct Thread {
    ucontext_t context;
    jmp_buf here;
    void* stack = nullptr;
    bool started = false, done = true;
    uint3 index;
};

struct Warp { unsigned alive = 0; std::deque<Meeting> meetings; };

struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Barrier barrier;
    int alive = 0, now = 0;
    long progress = 0;
    jmp_buf scheduler;
    sigjmp_buf fault;
    void* address = nullptr;
    std::function<void()> body;
};

inline Block block;

inline void leave() { if (_setjmp(block.threads[block.now].here) == 0) _longjmp(block.scheduler, 1); }

inline void fiber() {
    for (;;) {
        block.body();
        Thread& self = block.threads[block.now];
        self.done = true;
        block.alive--, block.progress++;
        block.warps[block.now / 32].alive &= ~(1u << (block.now % 32));
        leave();
    }
}

__attribute__((noinline)) inline void enter(int number) {
    Thread& thread = block.threads[number];
    block.now = number;
    threadIdx = thread.index;
    if (_setjmp(block.scheduler)) return;
    if (thread.started) _longjmp(thread.here, 1);
    thread.started = true;
    setcontext(&thread.context);
}

template <class Count> inline void wait(Barrier& barrier, Count expected) {
    const long generation = barrier.generation;
    barrier.arrived++, block.progress++;
    while (barrier.generation == generation) {
        if (barrier.arrived >= expected()) {
            barrier.arrived = 0, barrier.generation++, block.progress++;
            return;
        }
        leave();
    }
}

inline int lane() { return block.now % 32; }

inline Meeting& meeting(unsigned mask) {
    Warp& warp = block.warps[block.now / 32];
    for (Meeting& found : warp.meetings)
        if (found.mask == mask) return found;
    warp.meetings.push_back({mask});
    return warp.meetings.back();
}

// What every lane of the mask brings, as an array of 32 (of lanes that are not in it, anything). Valid until the
// second call after this one. Also what tensor cores are made of.
template <class T> inline const unsigned char (*gather(unsigned mask, const T& value))[SLOT] {
    static_assert(sizeof(T) <= SLOT, "too large to exchange");
    const int self = lane(), warp = block.now / 32;
    Meeting& first = meeting(mask);
    const int turn = first.turn[self]++ % 2;
    std::memcpy(first.slots[turn][self], &value, sizeof value);
    wait(first.barrier, [=] { return __builtin_popcount(mask & block.warps[warp].alive); });
    return meeting(mask).slots[turn];
}

template <class T> inline T exchange(unsigned mask, T value, int source, bool inside) {
    const auto slots = gather(mask, value);
    if (inside && (mask >> source & 1)) std::memcpy(&value, slots[source], sizeof value);
    return value;
}

inline void caught(int signal, siginfo_t* info, void*) {
    block.address = info->si_addr;
    siglongjmp(block.fault, signal == SIGILL ? MISALIGNED : OUTSIDE);
}

inline void prepare() {
    block.threads.resize(1024);
    block.warps.resize(32);
    for (Thread& thread : block.threads) {
        if (thread.started) continue;
        void* stack = thread.stack;
        constexpr int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        if (!stack) stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, kind, -1, 0);
        getcontext(&thread.context);
        thread.stack = thread.context.uc_stack.ss_sp = stack;
        thread.context.uc_stack.ss_size = STACK;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, fiber, 0);
    }
}

// As far as it gets without the other warps: then what these have not read yet, it has written over.
inline void run_warp(int warp, int threads) {
    for (long before = -1; before != block.progress;) {
        before = block.progress;
        for (int t = 32 * warp; t < std::min(threads, 32 * warp + 32); t++)
            if (!block.threads[t].done) enter(t);
    }
}

inline Outcome run_block(int threads, size_t shared) {
    std::memset(dynamic_shared, 0xff, SHARED);
    for (Warp& warp : block.warps) {
        warp.alive = 0;
        for (Meeting& old : warp.meetings) old.barrier = Barrier(), std::fill_n(old.turn, 32, 0);
    }
    const int warps = (threads + 31) / 32;
    block.barrier = Barrier(), block.alive = threads;
    for (int t = 0; t < threads; t++) {
        block.threads[t].done = false;
        block.threads[t].index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
        block.warps[t / 32].alive |= 1u << (t % 32);
    }
    while (block.alive) {
        const long before = block.progress;
        for (int w = 0; w < warps; w++) run_warp(blockIdx.x % 2 ? warps - 1 - w : w, threads);
        if (block.progress == before) return DEADLOCK;
    }
    for (size_t k = shared; k < SHARED; k++)
        if (dynamic_shared[k] != 0xff) return SHARED_OVERRUN;
    return DONE;
}

// While it lives, float32 that is subnormal is read and written as zero, as CuPy has kernels compiled (-ftz=true). On this
// processor float64 is, too, which a GPU leaves as it is.
struct Flush {
#ifdef __SSE__
    const unsigned before = _mm_getcsr();
    Flush() { _mm_setcsr(before | 0x8040); }
    ~Flush() { _mm_setcsr(before); }
#endif
};

// Every block of a grid. dims: of the grid, then of a block.
inline Outcome run(std::function<void()> body, const unsigned* dims, size_t shared) {
    static unsigned char alternate[1 << 16];
    stack_t stack = {alternate, 0, sizeof alternate}, old_stack;
    struct sigaction action = {}, old[3];
    action.sa_sigaction = caught, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    gridDim = {dims[0], dims[1], dims[2]}, blockDim = {dims[3], dims[4], dims[5]};
    const Flush flush;  // also in the fibers, whose contexts are made from this one
    prepare();
    block.body = body, block.address = nullptr;
    volatile Outcome outcome = DONE;
    sigaltstack(&stack, &old_stack);
    sigaction(SIGSEGV, &action, &old[0]), sigaction(SIGBUS, &action, &old[1]), sigaction(SIGILL, &action, &old[2]);
    if (const int fault = sigsetjmp(block.fault, 1)) outcome = Outcome(fault);
    else
        for (blockIdx.z = 0; blockIdx.z < gridDim.z && !outcome; blockIdx.z++)
            for (blockIdx.y = 0; blockIdx.y < gridDim.y && !outcome; blockIdx.y++)
                for (blockIdx.x = 0; blockIdx.x < gridDim.x && !outcome; blockIdx.x++)
                    outcome = run_block(blockDim.x * blockDim.y * blockDim.z, shared);
    sigaction(SIGSEGV, &old[0], nullptr), sigaction(SIGBUS, &old[1], nullptr), sigaction(SIGILL, &old[2], nullptr);
    sigaltstack(&old_stack, nullptr);
    if (outcome)
        for (Thread& thread : block.threads) thread.started = false;  // stuck: to be made again
    return outcome;
}

// ---- Entries: what a kernel's parameters are, as "pN" (const pointer to numbers of N bytes), "PN" (pointer), "iN",
// "fN" and "sN" (integer, float, struct of N bytes), and the call from untyped arguments.

template <class A> std::string describe() {
    using B = std::remove_cv_t<std::remove_reference_t<A>>;
    if constexpr (std::is_pointer_v<B>) {
        using E = std::remove_pointer_t<B>;
        return (std::is_const_v<E> ? "p" : "P") + std::to_string(sizeof(E));
    } else {
        const char* kind = std::is_integral_v<B> ? "i" : std::is_floating_point_v<B> ? "f" : "s";
        return kind + std::to_string(sizeof(B));
    }
}

struct Entry {
    std::string signature;
    std::function<void(void**)> call;
};

template <class... A, size_t... I> void apply(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_cv_t<std::remove_reference_t<A>>*>(args[I])...);
}

template <class... A> Entry entry(void (*kernel)(A...)) {
    std::string signature;
    ((signature += describe<A>() + " "), ...);
    return {signature, [kernel](void** args) { apply(kernel, args, std::index_sequence_for<A...>()); }};
}

std::vector<Entry>& entries();  // of the library that is built; see backend.py

}  // namespace emulation

extern "C" const char* emulation_signature(int entry) { return emulation::entries()[entry].signature.c_str(); }

// An Outcome; of OUTSIDE, also the address.
extern "C" int emulation_launch(int entry, const unsigned* dims, size_t shared, void** args, void** address) {
    const auto outcome = emulation::run([=] { emulation::entries()[entry].call(args); }, dims, shared);
    *address = emulation::block.address;
    return outcome;
}

inline void __syncthreads() { emulation::wait(emulation::block.barrier, [] { return emulation::block.alive; }); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::gather(mask, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T> T __shfl_sync(unsigned mask, T v, int from, int width = 32) {
    const int base = emulation::lane() / width * width;
    return emulation::exchange(mask, v, base + (from & (width - 1)), true);
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int other, int width = 32) {
    const int to = emulation::lane() ^ other;
    return emulation::exchange(mask, v, to, to / width == emulation::lane() / width);
}
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32) {
    const int to = emulation::lane() + int(by);
    return emulation::exchange(mask, v, to & 31, to / width == emulation::lane() / width);
}
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32) {
    const int to = emulation::lane() - int(by);
    return emulation::exchange(mask, v, to & 31, to >= emulation::lane() / width * width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const auto slots = emulation::gather(mask, predicate);
    unsigned found = 0;
    for (int lane = 0; lane < 32; lane++) {
        int value;
        std::memcpy(&value, slots[lane], sizeof value);
        if ((mask >> lane & 1) && value) found |= 1u << lane;
    }
    return found;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// One thread runs at a time: what is atomic on a GPU is so here by itself.
template <class T, class U> T atomicAdd(T* p, U v) { T old = *p; *p = old + T(v); return old; }
template <class T, class U> T atomicMax(T* p, U v) { T old = *p; *p = std::max(old, T(v)); return old; }
template <class T, class U> T atomicExch(T* p, U v) { T old = *p; *p = v; return old; }
template <class T, class U> T atomicCAS(T* p, U was, U v) { T old = *p; if (old == was) *p = v; return old; }

template <class T> T __ldg(const T* p) { return *p; }
template <class T> void __stwb(T* p, T v) { *p = v; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcs(T* p, T v) { *p = v; }
template <class T> void __stcg(T* p, T v) { *p = v; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t(a) * b) >> 32; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float __uint_as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { return __uint_as_float(unsigned(x)); }
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
template <class A, class B> std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B> std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
