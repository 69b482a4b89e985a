// CUDA's execution model on a CPU, so that the kernels in this folder run, unchanged, where there is no GPU.
//
// A thread of a block is a fiber: it runs until it reaches __syncthreads() or returns, then hands the core to the next
// thread of its block by switching the stack and the callee-saved registers (about 20 instructions). When every thread
// of the block has arrived, the next phase begins. Kernels without a barrier need no fibers and run as plain loops.
// Blocks are spread over operating-system threads. The order in which threads and blocks run can be chosen: a kernel
// whose result depends on it has a race. What the threads of a warp do together is in host_warp.h.
//
// What it notices: a barrier that not all threads reach, or that they reach at different lines; a warp whose threads
// part before something that they must do together; writes just outside a shared array (red zones); reads of shared
// memory that nobody wrote (it is filled with NaN for every block), or before an asynchronous copy into it was waited
// for; a fiber's stack that overflows. What it cannot show: the GPU's memory model, races inside a phase whose outcome is the same in
// every order, occupancy, speed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

// ---------------------------------------------------------------------------------------------- the language

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __constant__ static const
// In a .cu file runtime/shared_memory.py turns plain __shared__ arrays into SHARED_ARRAY. What it does not turn (in a
// header, or of an unnamed type) works like this, but has no red zones and no NaN fill.
#define __shared__ static thread_local

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
};

using std::abs, std::ceil, std::cos, std::exp, std::fabs, std::floor, std::fma, std::fmax, std::fmin, std::isfinite, std::isnan;
using std::log, std::pow, std::sin, std::sqrt, std::tanh;
template <class T>
inline T rsqrt(T x) { return T(1) / std::sqrt(x); }
template <class A, class B>  // of unlike types, too, as CUDA's overloads allow
inline std::common_type_t<A, B> min(A a, B b) {
    const std::common_type_t<A, B> first = a, second = b;
    return second < first ? second : first;
}
template <class A, class B>
inline std::common_type_t<A, B> max(A a, B b) {
    const std::common_type_t<A, B> first = a, second = b;
    return first < second ? second : first;
}
template <class T>
inline T __ldg(const T* address) { return *address; }

// Integer atomics only: float atomics would make sums depend on the order of threads, so they do not compile.
template <class T>
struct Value {
    typedef T type;  // not deduced: atomicAdd(&counts[i], 1) means a 1 of the type of the counts
};
#define HOST_ATOMIC(name, builtin)                                                                                        \
    template <class T>                                                                                                    \
    inline T name(T* address, typename Value<T>::type value) {                                                            \
        static_assert(std::is_integral<T>::value, #name " on floating-point numbers is not deterministic");               \
        return builtin(address, value, __ATOMIC_RELAXED);                                                                 \
    }
HOST_ATOMIC(atomicAdd, __atomic_fetch_add)
HOST_ATOMIC(atomicSub, __atomic_fetch_sub)
HOST_ATOMIC(atomicAnd, __atomic_fetch_and)
HOST_ATOMIC(atomicOr, __atomic_fetch_or)
HOST_ATOMIC(atomicXor, __atomic_fetch_xor)
HOST_ATOMIC(atomicExch, __atomic_exchange_n)
template <class T>
inline T atomicCAS(T* address, typename Value<T>::type expected, typename Value<T>::type value) {
    __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;  // now what was there before
}
// What is there is replaced while the value lies on this side of it.
#define HOST_ATOMIC_EXTREME(name, side)                                                                                   \
    template <class T>                                                                                                    \
    inline T name(T* address, typename Value<T>::type value) {                                                            \
        T before = __atomic_load_n(address, __ATOMIC_RELAXED);                                                            \
        while (value side before &&                                                                                       \
               !__atomic_compare_exchange_n(address, &before, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue; \
        return before;                                                                                                    \
    }
HOST_ATOMIC_EXTREME(atomicMin, <)
HOST_ATOMIC_EXTREME(atomicMax, >)
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
template <class To, class From>
inline To same_bits(From from) {
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float value) { return same_bits<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return same_bits<float>(bits); }

// ---------------------------------------------------------------------------------------------- fibers

namespace host __attribute__((visibility("hidden"))) {

enum class Order : int { ascending = 0, descending = 1, shuffled = 2 };

// One launch, as segnet_scratch/runtime/host.py fills it in (same fields, same order).
struct Launch {
    dim3 grid, block;
    unsigned long long dynamic_shared;  // bytes
    unsigned long long seed;            // of the shuffled order
    unsigned long long part_mask;       // only that part of the work runs whose number, masked, is part_value; numbered
    unsigned long long part_value;      // are the threads of the grid, or its blocks where threads meet at barriers
    unsigned long long* trace;          // hashes of the shared arrays at every barrier, or null; see trace_shared
    unsigned long long trace_size;
    int compare_trace;                  // 0: write the trace, 1: compare with it
    int order;                          // Order of the threads of a block
    int block_order;                    // Order of the blocks
    int workers;                        // operating-system threads
    int shared_byte;                    // what every byte of shared memory holds before a block
    unsigned long long barriers;        // out: how many the blocks met, all together
    char message[512];                  // what went wrong, when the launch returns non-zero
};

constexpr size_t kStackBytes = 160 * 1024;
constexpr size_t kStackReserve = 32 * 1024;  // the low end: an overflow passes the canary above it and harms nobody
constexpr size_t kSharedLimit = 256 * 1024;  // more than any GPU has for one block
constexpr size_t kRedZone = 64;
constexpr size_t kArenaAlignment = 1024;  // so that the low bits of a pointer are those of a shared address
constexpr unsigned char kRedByte = 0xA5;
constexpr unsigned char kPoisonByte = 0xFF;  // 0xFF... is a NaN in every floating-point format
// A cache line, wider than the holes in a frame that nobody writes.
constexpr char kStackCanary[65] = "A thread's stack ends here; what follows is there to be overrun.";

#ifdef __SANITIZE_ADDRESS__
constexpr bool kAddressSanitizer = true;
inline void allow(const void* start, size_t bytes) { __asan_unpoison_memory_region(start, bytes); }
inline void forbid(const void* start, size_t bytes) { __asan_poison_memory_region(start, bytes); }
#else
constexpr bool kAddressSanitizer = false;
inline void allow(const void*, size_t) {}
inline void forbid(const void*, size_t) {}
#endif

// A copy that cp.async has begun (async_copy.cuh): it is carried out at the wait.
struct AsyncCopy {
    void* to;
    const void* from;
    size_t read;  // bytes; the rest of 16 become zeros
};

// Where in the source an instruction stands; as a default argument, where its wrapper was called.
struct Place {
    const char* file;
    int line;
};
#define HERE ::host::Place here = {__builtin_FILE(), __builtin_LINE()}

// A short text for a message.
struct Text {
    char of[320];
};
template <class... Details>
Text text(const char* format, Details... details) {
    Text text;
    std::snprintf(text.of, sizeof text.of, format, details...);
    return text;
}
inline Text text(uint3 index) { return text("(%u, %u, %u)", index.x, index.y, index.z); }
// "line 12", or "ring.cuh:12" in a header.
inline Text text(Place place) {
    const char* const slash = std::strrchr(place.file, '/');
    const char* const name = slash ? slash + 1 : place.file;
    const char* const ending = std::strrchr(name, '.');
    return ending && std::strcmp(ending, ".cu") == 0 ? text("line %d", place.line) : text("%s:%d", name, place.line);
}

// Threads of a warp that have come to do something together (host_warp.h).
struct Meeting {
    const char* operation;
    Place place;
    unsigned mask, arrived;  // a bit for each lane of the warp
    void* posts[32];         // what each lane brings and takes away
};

// What works beside the threads of a block: Hopper's asynchronous units (host_hopper.h), where a source includes them.
struct Engine {
    virtual ~Engine() = default;
    virtual void begin_block() = 0;
    virtual bool advance() = 0;       // no thread can run: does something that was in flight; true if it has
    virtual void report_waits() = 0;  // nothing is in flight, and threads wait for it
    virtual void end_block() = 0;     // all threads have returned
};
extern Engine* (*make_engine)();  // null: there is none

struct Fiber {
    uint3 index;             // threadIdx
    void* stack_pointer;     // saved while the fiber does not run
    char* stack;             // lowest address
    int barrier_line;        // where it waits; 0: it has returned
    Meeting* meeting;        // where it waits for others of its warp, or null
    bool waits_for_engine;
    std::vector<AsyncCopy> copies;
    std::vector<size_t> copy_groups;  // where each group that was committed ends in `copies`
};

struct SharedArray {
    const void* key;
    const char* name;
    size_t offset, bytes;
};

struct Worker {
    // The launch and the block that runs now.
    Launch* launch = nullptr;
    const char* kernel = "";
    uint3 block_index{};
    // The thread that runs now.
    Fiber* current = nullptr;
    // Fibers: `order` is the order of the phase, `position` who has begun it; `ready` can go on in the midst of it, the
    // last one first.
    bool cooperative = false;
    std::vector<Fiber> fibers;
    std::vector<unsigned> order;
    unsigned position = 0;
    std::vector<unsigned> ready;
    std::vector<Meeting> meetings;  // one for each thread: those that it comes to first
    Engine* engine = nullptr;       // its own
    int last_barrier_line = 0;  // 0: the block has met no barrier yet
    void* scheduler_stack_pointer = nullptr;
    void (*body)(void** arguments) = nullptr;  // one thread of the kernel
    void** arguments = nullptr;                // addresses of their values
    bool failed = false;
    uint64_t random = 0;
    // Shared memory: arrays between red zones, one after the other.
    std::vector<unsigned char> arena;
    unsigned char* arena_base = nullptr;  // the first multiple of kArenaAlignment in `arena`: shared address 0
    std::vector<SharedArray> shared;
    size_t trace_position = 0;

    ~Worker() { delete engine; }
    uint64_t next_random() {  // splitmix64
        uint64_t z = (random += 0x9E3779B97F4A7C15ull);
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        return z ^ (z >> 31);
    }
    template <class T>
    void shuffle(std::vector<T>& items, size_t first = 0) {
        for (size_t i = items.size() - first; i > 1; --i) std::swap(items[first + i - 1], items[first + next_random() % i]);
    }
    bool left_out(uint64_t number) const { return (number & launch->part_mask) != launch->part_value; }
    template <class... Details>
    void fail(const char* format, Details... details) {
        failed = true;
        std::snprintf(launch->message, sizeof launch->message, "%s: block %s: %s", kernel, text(block_index).of,
                      text(format, details...).of);
    }
};
extern __thread Worker* worker;

// Gives up the block for good: back to the scheduler.
[[noreturn]] void leave_block(Worker* w);

// The running fiber cannot go on: hands the core to the next one. Returns when it is its turn again.
void pass_on(Worker* w);

struct NeedsFibers {};

// __syncthreads() in this line.
void barrier(int line);

// The shared array of this key in the block that runs; made where there is none.
void* shared_memory(const void* key, const char* name, size_t bytes);

// Dynamic shared memory that is declared outside of functions: a pointer that every worker sets before its first block.
struct GlobalShared;
extern GlobalShared* global_shared;  // the list of them
struct GlobalShared {
    const char* name;
    void (*set)(void* memory);
    GlobalShared* next;
    GlobalShared(const char* name, void (*set)(void*)) : name(name), set(set), next(global_shared) { global_shared = this; }
};

// Runs a kernel; 0, or 1 and a message in `launch`.
int run(Launch* launch, const char* kernel, bool cooperative, void (*body)(void**), void** arguments);

// Calls a kernel with arguments given as addresses of values, as cuLaunchKernel does.
template <class... P, size_t... I>
void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_cv_t<P>*>(arguments[I])...);
}
template <class... P>
void call(void (*kernel)(P...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<P...>());
}

}  // namespace host

#define threadIdx (::host::worker->current->index)
#define blockIdx (::host::worker->block_index)
#define blockDim (::host::worker->launch->block)
#define gridDim (::host::worker->launch->grid)
#define __syncthreads() ::host::barrier(__LINE__)

#define SHARED_ARRAY(type, name, dimensions)      \
    typedef type name##_array dimensions;         \
    static const char name##_key = 0;             \
    name##_array& name =                          \
        *static_cast<name##_array*>(::host::shared_memory(&name##_key, #name, sizeof(name##_array)))
#define SHARED_DYNAMIC(type, name) \
    type* const name =             \
        static_cast<type*>(::host::shared_memory(::host::worker->launch, #name, ::host::worker->launch->dynamic_shared))
#define SHARED_DYNAMIC_GLOBAL(type, name)  \
    static thread_local type* name = nullptr; \
    static ::host::GlobalShared name##_global(#name, [](void* memory) { name = static_cast<type*>(memory); })

#include "host_warp.h"

// The entry by which segnet_scratch/runtime/host.py reaches a kernel.
#define HOST_ENTRY(kernel, cooperative)                                              \
    extern "C" __attribute__((visibility("default"))) int host_launch_##kernel(::host::Launch* launch, void** arguments) {  \
        return ::host::run(launch, #kernel, cooperative, [](void** values) { ::host::call(kernel, values); }, arguments);  \
    }
