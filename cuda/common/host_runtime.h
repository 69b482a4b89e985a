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

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <sys/mman.h>

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

namespace host {

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
    size_t bytes, read;  // what lies between is zeros
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
    virtual bool advance() = 0;       // no thread can run: does something that was under way; true if it has
    virtual void report_waits() = 0;  // nothing is under way, and threads wait for it
    virtual void end_block() = 0;     // all threads have returned
};
static Engine* (*make_engine)() = nullptr;

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

// The stacks outlive a launch: mapping them anew for each would cost more than a small kernel.
struct StackPool {
    std::mutex mutex;
    std::vector<char*> free;
    char* take() {
        std::lock_guard<std::mutex> lock(mutex);
        if (free.empty()) {
            void* const stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
            return stack == MAP_FAILED ? nullptr : static_cast<char*>(stack);
        }
        char* const stack = free.back();
        free.pop_back();
        return stack;
    }
    void give(char* stack) {
        allow(stack, kStackBytes);  // a fiber that was left in the middle has not cleared the marks round its variables
        std::lock_guard<std::mutex> lock(mutex);
        free.push_back(stack);
    }
};
static StackPool stacks;

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
    std::unique_ptr<Engine> engine;
    int last_barrier_line = 0;  // 0: the block has met no barrier yet
    void* scheduler_stack_pointer = nullptr;
    std::function<void()> body;  // the kernel with its arguments
    bool failed = false;
    uint64_t random = 0;
    // Shared memory: arrays between red zones, one after the other.
    std::vector<unsigned char> arena;
    unsigned char* arena_base = nullptr;  // the first multiple of kArenaAlignment in `arena`: shared address 0
    std::vector<SharedArray> shared;
    size_t trace_position = 0;

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
static thread_local Worker* worker = nullptr;

#ifdef __SANITIZE_ADDRESS__
// Adds to a report which thread caused it.
inline void tell_thread(const char*) {
    if (!worker || !worker->current) return;
    std::fprintf(stderr, "segnet: block %s, thread %s\n", text(worker->block_index).of, text(worker->current->index).of);
}
#endif

#if defined(__APPLE__)
#define SEGNET_SYMBOL(name) "_" #name
#define SEGNET_HIDE(name) ".private_extern _" #name "\n"
#else
#define SEGNET_SYMBOL(name) #name
#define SEGNET_HIDE(name) ".hidden " #name "\n"
#endif

#if defined(__x86_64__)
extern "C" __attribute__((visibility("hidden"))) void segnet_switch_fiber(void** save, void* load);
asm(".text\n.p2align 4\n.globl " SEGNET_SYMBOL(segnet_switch_fiber) "\n" SEGNET_HIDE(segnet_switch_fiber)
    SEGNET_SYMBOL(segnet_switch_fiber) ":\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
inline void* prepare_stack(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStackBytes);
    *--top = nullptr;  // entry() finds the alignment that a call instruction would leave, and no return address
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // rbp rbx r12-r15
    return top;
}
#elif defined(__aarch64__)
extern "C" __attribute__((visibility("hidden"))) void segnet_switch_fiber(void** save, void* load);
asm(".text\n.p2align 4\n.globl " SEGNET_SYMBOL(segnet_switch_fiber) "\n" SEGNET_HIDE(segnet_switch_fiber)
    SEGNET_SYMBOL(segnet_switch_fiber) ":\n"
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\n"
    "stp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
    "mov x2, sp\nstr x2, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\n"
    "ldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\nret\n");
inline void* prepare_stack(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStackBytes) - 20;
    std::memset(top, 0, 160);
    top[11] = reinterpret_cast<void*>(entry);  // x30, the address that ret jumps to
    return top;
}
#else
#error "the host device knows x86-64 and aarch64; another processor needs its own segnet_switch_fiber"
#endif

// The fiber whose turn it is; null where none can run before the next phase.
inline Fiber* next_fiber(Worker* w) {
    if (!w->ready.empty()) {
        Fiber* next = &w->fibers[w->ready.back()];
        w->ready.pop_back();
        return next;
    }
    return w->position < w->order.size() ? &w->fibers[w->order[w->position++]] : nullptr;
}

// Finds out between which barriers threads disturb each other: of two runs with unlike orders of threads the first
// writes down what every shared array holds at every barrier, the second stops where it holds something else.
inline void trace_shared(Worker* w, int line) {
    for (const SharedArray& array : w->shared) {
        if (w->trace_position == w->launch->trace_size) return;
        unsigned long long hash = 0xCBF29CE484222325ull + line;  // FNV-1a
        for (size_t i = 0; i < array.bytes; ++i) hash = (hash ^ w->arena_base[array.offset + i]) * 0x100000001B3ull;
        unsigned long long& entry = w->launch->trace[w->trace_position++];
        if (!w->launch->compare_trace) {
            entry = hash;
        } else if (entry != hash) {
            auto barrier = [](int at, const char* none) { return at ? text("the barrier in line %d", at) : text(none); };
            return w->fail("between %s and %s the threads disturb each other in shared array '%s'",
                           barrier(w->last_barrier_line, "the start of the kernel").of, barrier(line, "its end").of, array.name);
        }
    }
}

// No thread can run, and this one waits for others of its warp.
inline void report_parted_warp(Worker* w, const Fiber& waiting) {
    const Meeting& meeting = *waiting.meeting;
    const size_t warp = size_t(&waiting - w->fibers.data()) / 32 * 32;
    const Fiber& other = w->fibers[warp + unsigned(__builtin_ctz(meeting.mask & ~meeting.arrived))];
    const Text where = other.meeting        ? text("waits in %s at %s", other.meeting->operation, text(other.meeting->place).of)
                       : other.barrier_line ? text("waits at the barrier in line %d", other.barrier_line)
                                            : text("has returned");
    w->fail("divergent warp: thread %s waits in %s at %s for thread %s, which %s", text(waiting.index).of, meeting.operation,
            text(meeting.place).of, text(other.index).of, where.of);
}

// No thread can run: all have arrived at a barrier, or returned, or wait for their warp. True: a next phase begins.
inline bool finish_phase(Worker* w) {
    const int line = w->fibers[0].barrier_line;
    for (const Fiber& fiber : w->fibers) {
        if (!fiber.waits_for_engine) continue;
        w->engine->report_waits();
        return false;
    }
    for (const Fiber& fiber : w->fibers) {
        if (!fiber.meeting) continue;
        report_parted_warp(w, fiber);
        return false;
    }
    for (const Fiber& fiber : w->fibers) {
        if (fiber.barrier_line == line) continue;
        const Fiber& waiting = line ? w->fibers[0] : fiber;
        const Fiber& other = line ? fiber : w->fibers[0];
        const Text where = other.barrier_line ? text("at line %d", other.barrier_line) : text("has returned");
        w->fail("divergent barrier: thread %s waits at line %d, thread %s %s", text(waiting.index).of, waiting.barrier_line,
                text(other.index).of, where.of);
        return false;
    }
    if (w->launch->trace) trace_shared(w, line);
    w->last_barrier_line = line;
    w->launch->barriers += line != 0;
    return line != 0 && !w->failed;
}

// Gives up the block for good: back to the scheduler.
[[noreturn]] inline void leave_block(Worker* w) {
    segnet_switch_fiber(&w->current->stack_pointer, w->scheduler_stack_pointer);
    std::abort();  // a block that has finished or failed is never resumed
}

// The running fiber cannot go on: hands the core to the next one. Returns when it is its turn again.
inline void pass_on(Worker* w) {
    Fiber* self = w->current;
    Fiber* next = next_fiber(w);
    while (!next && w->engine && w->engine->advance()) next = next_fiber(w);
    if (!next) {
        if (!finish_phase(w)) leave_block(w);
        w->position = 0;
        if (w->launch->order == int(Order::shuffled)) w->shuffle(w->order);
        next = next_fiber(w);
    }
    w->current = next;
    if (w->current != self) segnet_switch_fiber(&self->stack_pointer, w->current->stack_pointer);
}

// The running fiber waits (line > 0) or has returned (line 0).
inline void leave(int line) {
    worker->current->barrier_line = line;
    pass_on(worker);
}

struct NeedsFibers {};

inline void barrier(int line) {
    if (!worker->cooperative) throw NeedsFibers();
    leave(line);
}

inline void fiber_entry() {
    worker->body();
    leave(0);
    std::abort();
}

inline void* shared_memory(const void* key, const char* name, size_t bytes) {
    Worker* w = worker;
    if (!w->cooperative) throw NeedsFibers();
    for (const SharedArray& array : w->shared)
        if (array.key == key) return w->arena_base + array.offset;
    const size_t start = w->shared.empty() ? 0 : w->shared.back().offset + ((w->shared.back().bytes + 63) & ~size_t(63));
    SharedArray array{key, name, start + kRedZone, bytes};
    if (array.offset + bytes > kSharedLimit) {
        w->fail("shared array '%s' (%zu bytes) does not fit into the %zu bytes of a block", name, bytes, kSharedLimit);
        leave_block(w);
    }
    w->shared.push_back(array);
    unsigned char* const base = w->arena_base + array.offset;
    const size_t after = kRedZone + 63 - (bytes + 63) % 64;
    allow(base - kRedZone, kRedZone);
    std::memset(base - kRedZone, kRedByte, kRedZone);
    std::memset(base, w->launch->shared_byte, bytes);
    std::memset(base + bytes, kRedByte, after);
    forbid(base - kRedZone, kRedZone);
    forbid(base + bytes, after);
    return base;
}

// Dynamic shared memory that is declared outside of functions: a pointer that every worker sets before its first block.
struct GlobalShared;
static GlobalShared* global_shared = nullptr;  // the list of them
struct GlobalShared {
    const char* name;
    void (*set)(void* memory);
    GlobalShared* next;
    GlobalShared(const char* name, void (*set)(void*)) : name(name), set(set), next(global_shared) { global_shared = this; }
};

// After a block: were the red zones kept? Then poison the arrays for the next block.
inline void check_shared(Worker* w) {
    for (const SharedArray& array : w->shared) {
        const unsigned char* base = w->arena_base + array.offset;
        for (size_t i = 0; i < kRedZone && !kAddressSanitizer; ++i) {  // it watches the red zones itself
            const bool before = base[-1 - long(i)] != kRedByte, after = base[array.bytes + i] != kRedByte;
            if (!before && !after) continue;
            return w->fail("wrote %s shared array '%s' (%zu bytes)", before ? "before" : "past the end of", array.name, array.bytes);
        }
        std::memset(w->arena_base + array.offset, w->launch->shared_byte, array.bytes);
    }
}

inline uint3 index_of(uint64_t number, const dim3& size) {
    return {unsigned(number % size.x), unsigned(number / size.x % size.y), unsigned(number / size.x / size.y)};
}

inline void run_block_flat(Worker* w, uint64_t block) {
    Fiber thread{};
    w->current = &thread;
    for (const unsigned number : w->order) {
        if (w->left_out(block * w->order.size() + number)) continue;
        thread.index = index_of(number, w->launch->block);
        w->body();
    }
}

inline void run_block_fibers(Worker* w) {
    for (Fiber& fiber : w->fibers) {
        allow(fiber.stack, kStackBytes);  // its last thread never returned from fiber_entry: marks are left
        fiber.stack_pointer = prepare_stack(fiber.stack, fiber_entry);
        fiber.copies.clear();
        fiber.copy_groups.clear();
    }
    if (w->engine) w->engine->begin_block();
    w->position = 0;
    w->last_barrier_line = 0;
    w->current = next_fiber(w);
    // Returns when the block has finished or failed.
    segnet_switch_fiber(&w->scheduler_stack_pointer, w->current->stack_pointer);
    if (w->failed) return;
    for (Fiber& fiber : w->fibers)
        if (std::memcmp(fiber.stack + kStackReserve, kStackCanary, sizeof kStackCanary - 1) != 0)
            return w->fail("a thread needs more stack than the host device gives it");
    if (w->engine) w->engine->end_block();
    if (w->failed) return;
    check_shared(w);
}

// Runs the blocks that this operating-system thread can get hold of.
template <class NextBlock>
void run_worker(Worker& w, NextBlock next_block, std::atomic<bool>& stop) {
    worker = &w;
#ifdef __SANITIZE_ADDRESS__
    __asan_set_error_report_callback(tell_thread);
#endif
    const unsigned threads = w.launch->block.x * w.launch->block.y * w.launch->block.z;
    w.order.resize(threads);
    auto order_threads = [&] {
        for (unsigned i = 0; i < threads; ++i)
            w.order[i] = w.launch->order == int(Order::descending) ? threads - 1 - i : i;
        if (w.launch->order == int(Order::shuffled)) w.shuffle(w.order);
    };
    order_threads();
    if (w.cooperative) {
        w.arena.resize(kSharedLimit + 4 * kRedZone + kArenaAlignment);
        w.arena_base = w.arena.data() + (kArenaAlignment - reinterpret_cast<uintptr_t>(w.arena.data()) % kArenaAlignment);
        if (make_engine) w.engine.reset(make_engine());
        w.fibers.resize(threads);
        w.ready.reserve(threads);
        w.meetings.resize(threads);
        for (unsigned i = 0; i < threads; ++i) {
            Fiber& fiber = w.fibers[i];
            fiber.index = index_of(i, w.launch->block);
            fiber.stack = stacks.take();
            if (!fiber.stack) {
                w.fail("out of memory for the stacks of the threads");
                break;
            }
            std::memcpy(fiber.stack + kStackReserve, kStackCanary, sizeof kStackCanary - 1);
        }
        for (GlobalShared* array = global_shared; array; array = array->next)
            array->set(shared_memory(w.launch, array->name, w.launch->dynamic_shared));
    }
    uint64_t block;
    while (!w.failed && !stop.load(std::memory_order_relaxed) && next_block(&block)) {
        w.block_index = index_of(block, w.launch->grid);
        if (w.launch->order == int(Order::shuffled)) {
            // From the seed and the block alone: a failure comes again, whichever worker gets the block.
            w.random = w.launch->seed;
            w.random = w.next_random() + block;
            order_threads();
        }
        if (w.cooperative) {
            if (!w.left_out(block)) run_block_fibers(&w);
        } else {
            try {
                run_block_flat(&w, block);
            } catch (const NeedsFibers&) {
                w.fail("reached a barrier or a shared array although its text has none; put __syncthreads() or SHARED_ARRAY "
                       "in the .cu file");
            }
        }
    }
    if (w.failed) stop = true;
    for (Fiber& fiber : w.fibers)
        if (fiber.stack) stacks.give(fiber.stack);
    worker = nullptr;
}

inline int run(Launch* launch, const char* kernel, bool cooperative, const std::function<void()>& body) {
    const uint64_t blocks = uint64_t(launch->grid.x) * launch->grid.y * launch->grid.z;
    std::vector<uint64_t> block_order;
    if (launch->block_order == int(Order::shuffled)) {
        Worker shuffler;
        shuffler.random = launch->seed ^ 0xB10C;
        for (uint64_t i = 0; i < blocks; ++i) block_order.push_back(i);
        shuffler.shuffle(block_order);
    }
    std::atomic<uint64_t> next{0};
    std::atomic<bool> stop{false};
    auto next_block = [&](uint64_t* block) {
        const uint64_t i = next.fetch_add(1, std::memory_order_relaxed);
        if (i >= blocks) return false;
        const bool descending = launch->block_order == int(Order::descending);
        *block = descending ? blocks - 1 - i : block_order.empty() ? i : block_order[i];
        return true;
    };
    const uint64_t wanted = launch->workers < 1 ? 1 : uint64_t(launch->workers);
    const size_t count = size_t(wanted < blocks ? wanted : blocks);
    std::vector<Worker> workers(count);
    std::vector<Launch> launches(count, *launch);  // each worker has a message of its own
    auto start = [&](size_t i) {
        Worker& w = workers[i];
        w.launch = &launches[i];
        w.kernel = kernel;
        w.cooperative = cooperative;
        w.body = body;
        run_worker(w, next_block, stop);
    };
    std::vector<std::thread> threads;
    try {
        for (size_t i = 1; i < count; ++i) threads.emplace_back(start, i);
    } catch (const std::system_error&) {
        // The system gives no more threads: those there are do all the blocks.
    }
    start(0);
    for (std::thread& thread : threads) thread.join();
    for (const Launch& part : launches) launch->barriers += part.barriers;
    for (size_t i = 0; i < count; ++i)
        if (workers[i].failed) {
            std::memcpy(launch->message, launches[i].message, sizeof launch->message);
            return 1;
        }
    return 0;
}

// Calls a kernel with arguments given as addresses of values, as cuLaunchKernel does.
template <class... P>
int launch(Launch* launch, const char* name, bool cooperative, void (*kernel)(P...), void** arguments) {
    const std::tuple<std::remove_cv_t<P>*...> values{static_cast<std::remove_cv_t<P>*>(*arguments++)...};
    return run(launch, name, cooperative, [&] { std::apply([&](auto*... value) { kernel(*value...); }, values); });
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
        return ::host::launch(launch, #kernel, cooperative, kernel, arguments);      \
    }
