// How a launch is carried out on the host device; what kernels see of it, and what it is, is in host_runtime.h.
//
// Compiled once and linked into the library of every .cu file.
#include "host_runtime.h"

#include <atomic>
#include <mutex>
#include <system_error>
#include <thread>

#include <sys/mman.h>

namespace host {

Engine* (*make_engine)() = nullptr;
GlobalShared* global_shared = nullptr;
__thread Worker* worker = nullptr;

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

#ifdef __SANITIZE_ADDRESS__
// Adds to a report which thread caused it.
static void tell_thread(const char*) {
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
static void* prepare_stack(char* stack, void (*entry)()) {
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
static void* prepare_stack(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStackBytes) - 20;
    std::memset(top, 0, 160);
    top[11] = reinterpret_cast<void*>(entry);  // x30, the address that ret jumps to
    return top;
}
#else
#error "the host device knows x86-64 and aarch64; another processor needs its own segnet_switch_fiber"
#endif

// The fiber whose turn it is; null where none can run before the next phase.
static Fiber* next_fiber(Worker* w) {
    if (!w->ready.empty()) {
        Fiber* next = &w->fibers[w->ready.back()];
        w->ready.pop_back();
        return next;
    }
    return w->position < w->order.size() ? &w->fibers[w->order[w->position++]] : nullptr;
}

// Finds out between which barriers threads disturb each other: of two runs with unlike orders of threads the first
// writes down what every shared array holds at every barrier, the second stops where it holds something else.
static void trace_shared(Worker* w, int line) {
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
static void report_parted_warp(Worker* w, const Fiber& waiting) {
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
static bool finish_phase(Worker* w) {
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

[[noreturn]] void leave_block(Worker* w) {
    segnet_switch_fiber(&w->current->stack_pointer, w->scheduler_stack_pointer);
    std::abort();  // a block that has finished or failed is never resumed
}

void pass_on(Worker* w) {
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
static void leave(int line) {
    worker->current->barrier_line = line;
    pass_on(worker);
}

void barrier(int line) {
    if (!worker->cooperative) throw NeedsFibers();
    leave(line);
}

static void fiber_entry() {
    worker->body(worker->arguments);
    leave(0);
    std::abort();
}

void* shared_memory(const void* key, const char* name, size_t bytes) {
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

// After a block: were the red zones kept? Then poison the arrays for the next block.
static void check_shared(Worker* w) {
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

static uint3 index_of(uint64_t number, const dim3& size) {
    return {unsigned(number % size.x), unsigned(number / size.x % size.y), unsigned(number / size.x / size.y)};
}

static void run_block_flat(Worker* w, uint64_t block) {
    Fiber thread{};
    w->current = &thread;
    for (const unsigned number : w->order) {
        if (w->left_out(block * w->order.size() + number)) continue;
        thread.index = index_of(number, w->launch->block);
        w->body(w->arguments);
    }
}

static void run_block_fibers(Worker* w) {
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
        if (make_engine) w.engine = make_engine();
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

int run(Launch* launch, const char* kernel, bool cooperative, void (*body)(void**), void** arguments) {
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
        w.arguments = arguments;
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

}  // namespace host
