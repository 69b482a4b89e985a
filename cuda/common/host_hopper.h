// Hopper's asynchronous units on the host device: what mbarrier.cuh, tma.cuh, wgmma.cuh and warpgroup.cuh are built on.
//
// A thread that waits (for an mbarrier, a named barrier, its warpgroup, registers) gives way. What is asynchronous happens
// as late as it can: a copy arrives when no thread can go on without it, a product is computed at the wait that covers it,
// and both read their operands then. In shuffled orders copies also arrive early, in an order of the seed.
// If nothing is in flight and threads still wait, the wait is endless, which is a fault.
//
// Shared memory has two views, as it has on the GPU: what threads store is in the arena, what TMA and wgmma see is in a
// copy of it, which fence_proxy_async brings up to date. Where TMA or wgmma read and the two differ, a fence is missing.
// (A fence counts for all that was stored before it, by whichever thread: the memory model asks no more, if a barrier lies
// between.)
#pragma once

#include <algorithm>
#include <deque>
#include <memory>
#include <set>

namespace host {

// Code that looks at memory which AddressSanitizer may know as forbidden.
#define HOST_UNCHECKED __attribute__((no_sanitize("address")))

constexpr int kWarpgroup = 128;
constexpr int kUnit = 16;  // bytes of shared memory: what swizzles move and what is kept account of
constexpr size_t kUnits = kSharedLimit / kUnit;

HOST_CALL unsigned shared_offset(const char* operation, Place place, const void* pointer, unsigned alignment) {
    if (!worker->cooperative) throw NeedsFibers();
    const uintptr_t address = reinterpret_cast<uintptr_t>(pointer), base = reinterpret_cast<uintptr_t>(worker->arena_base);
    if (address < base || address >= base + kSharedLimit) fault(operation, place, "has an address that is not in shared memory");
    if ((address - base) % alignment)
        fault(operation, place, "has the shared address %zu, which is no multiple of %u", size_t(address - base), alignment);
    return unsigned(address - base);
}

// The shared array that holds an address; null between arrays.
inline const SharedArray* array_at(size_t offset) {
    for (const SharedArray& array : worker->shared)
        if (offset >= array.offset && offset < array.offset + array.bytes) return &array;
    return nullptr;
}

// The final address of a byte in a place with swizzle: bits 7 to 9 of an address exchange its pieces of 16 bytes.
inline unsigned swizzled(unsigned address) { return address ^ ((address >> 7 & 7) << 4); }

// What a TensorMap holds on the host device, as segnet_scratch/runtime/tensor_map.py fills it in (same fields, same order).
struct MapFields {
    unsigned magic;
    unsigned char rank, im2col, element;
    unsigned long long address;
    unsigned long long strides[4];  // bytes, from the second dimension on
    unsigned sizes[5];              // numbers, innermost first
    unsigned short box[5];          // of im2col: channels, pixels
    signed char lower[2], upper[2];  // of im2col: the corners of the pixels, x and y, from the first and the last
};
constexpr unsigned kMapMagic = 0x50414D54;  // "TMAP"

struct Barrier {
    unsigned offset;
    Place initialised;
    unsigned initialiser;
    bool fenced;
    int arrivals;          // of a phase
    int pending;           // arrivals that the phase still lacks
    long long bytes;       // that it still lacks; below 0 for a while where they come before they are announced
    unsigned long long phase;
};

// A box that is being copied.
struct Transfer {
    const char* operation;
    Place place;
    MapFields map;
    int corner[4], tap[2];
    unsigned offset, bytes;     // in shared memory
    Barrier* barrier;
};

// The sums of a warpgroup, 64 x N, while products that add to them are in flight.
struct Sums {
    std::vector<float> values;  // row by row
    int products = 0;           // that are in flight
    struct Fragment* fragments[kWarpgroup] = {};
};

// An operand in shared memory: 16 deep, `count` rows of a or columns of b.
struct Operand {
    unsigned long long descriptor;
    bool mn_major;
    int count;
};

struct Product {
    Place place;
    Operand a, b;
    bool accumulate;
    std::shared_ptr<Sums> sums;
};

// What is noted of a thread's accumulators.
struct Fragment {
    float* values;
    int count;
    std::shared_ptr<Sums> pending;  // while products are in flight
    Place begun;                    // where
    const unsigned long long* epoch;  // of the thread: how often it has fenced
    unsigned long long touched;       // the epoch in which it last accessed them

    [[noreturn]] void report_access(Place place) const;
};

struct NamedBarrier {
    int threads, arrived;
    std::set<unsigned> waiting;
};

// 128 threads that have come to do something together.
struct Gathering {
    const char* operation;
    Place place;
    int arrived = 0;
};

struct Wait {
    const char* operation = nullptr;  // null: does not wait
    Place place;
    const Barrier* barrier;
    unsigned parity;
};

struct ThreadState {
    Wait wait;
    // wgmma (host_wgmma.h)
    unsigned long long epoch;  // counts its fences
    size_t products, groups;   // begun, committed
};

struct WarpgroupState {
    Gathering gathering;
    int registers, wanted;  // a thread; wanted: more than there were, 0: nothing
    std::vector<std::unique_ptr<Product>> products;  // that are in flight
    size_t first_product;                            // number of the first of them
    std::vector<size_t> group_ends;
};

// How the units of shared memory are being used by what is in flight.
struct Usage {
    unsigned short products;
    bool load;
};

class Hopper : public Engine {
  public:
    std::deque<Barrier> barriers;
    NamedBarrier named[16];
    std::vector<ThreadState> threads;
    std::vector<WarpgroupState> warpgroups;
    std::vector<std::unique_ptr<Transfer>> loads;
    std::vector<Usage> usage;
    std::vector<unsigned char> view;  // shared memory as TMA and wgmma see it
    int free_registers;
    unsigned waiting;  // threads

    static Hopper& get() {
        if (!worker->cooperative) throw NeedsFibers();
        return *static_cast<Hopper*>(worker->engine);
    }
    ThreadState& self() { return threads[thread_number()]; }

    void begin_block() override;
    bool advance() override;
    void report_waits() override;
    void end_block() override;

    // The thread that runs waits until somebody calls wake(it).
    void wait(const char* operation, Place place, const Barrier* barrier = nullptr, unsigned parity = 0) {
        self().wait = {operation, place, barrier, parity};
        ++waiting;
        worker->current->waits_for_engine = true;
        pass_on(worker);
    }
    void wake(unsigned thread) {
        Worker* const w = worker;
        threads[thread].wait.operation = nullptr;
        --waiting;
        w->fibers[thread].waits_for_engine = false;
        w->ready.push_back(thread);
        if (w->launch->order == int(Order::shuffled))
            std::swap(w->ready.back(), w->ready[w->next_random() % w->ready.size()]);
    }
    // Wakes those of [first, last) for whom `chosen` is true, so that they go on in the order of the launch.
    template <class Chosen>
    void wake_all(unsigned first, unsigned last, Chosen chosen) {
        const bool descending = worker->launch->order == int(Order::descending);
        for (unsigned i = first; i < last; ++i) {  // the last one pushed runs first
            const unsigned thread = descending ? i : last - 1 - (i - first);
            if (chosen(thread)) wake(thread);
        }
    }

    // All 128 threads of the warpgroup meet; the last one calls carry_out() for all; true: they go on.
    template <class CarryOut>
    void gather(const char* operation, Place place, CarryOut carry_out) {
        const unsigned thread = thread_number(), first = thread / kWarpgroup * kWarpgroup;
        whole_warpgroup(operation, place);
        Gathering& g = warpgroups[thread / kWarpgroup].gathering;
        if (g.arrived == 0) {
            g.operation = operation;
            g.place = place;
        } else if (g.place.line != place.line || std::strcmp(g.operation, operation) != 0) {
            fault(operation, place, "is reached while others of the warpgroup are in %s at %s: an incomplete warpgroup",
                  g.operation, text(g.place).of);
        }
        if (++g.arrived < kWarpgroup) return wait(operation, place);
        g = Gathering();
        if (!carry_out()) return wait(operation, place);  // whoever makes it possible wakes them all
        wake_all(first, first + kWarpgroup, [&](unsigned other) { return other != thread; });
    }
    void whole_warpgroup(const char* operation, Place place) {
        if (thread_number() / kWarpgroup * kWarpgroup + kWarpgroup > threads.size())
            fault(operation, place, "takes a warpgroup of 128 threads; the block has no more: an incomplete warpgroup");
    }

    Barrier& barrier_at(const char* operation, Place place, const void* pointer);
    void complete_if_done(Barrier& barrier);
    HOST_UNCHECKED void update_view(Place place);
    // Reads what TMA or wgmma see; a fault where a fence is missing.
    HOST_UNCHECKED void read(const char* operation, Place place, unsigned offset, void* to, unsigned bytes) const {
        const unsigned char *stored = worker->arena_base + offset, *seen = view.data() + offset;
        for (unsigned i = 0; i < bytes; ++i)
            if (stored[i] != seen[i]) missing_fence(operation, place, offset + i);
        std::memcpy(to, seen, bytes);
    }
    [[noreturn]] void missing_fence(const char* operation, Place place, unsigned offset) const {
        const SharedArray* const array = array_at(offset);
        fault(operation, place,
              "reads shared array '%s' at byte %zu, where a thread has stored without fence_proxy_async (and a barrier) after it",
              array ? array->name : "?", array ? offset - array->offset : 0);
    }
    // Writes for TMA: in both views.
    HOST_UNCHECKED void write(unsigned offset, const unsigned char* from, unsigned bytes) {
        for (unsigned i = 0; i < bytes; ++i) worker->arena_base[offset + i] = view[offset + i] = from[i];
    }

    void arrive(unsigned i);  // load i brings its box
    void maybe_early() {
        if (worker->launch->order == int(Order::shuffled) && !loads.empty() && worker->next_random() % 2)
            arrive(unsigned(worker->next_random() % loads.size()));
    }
};

// ------------------------------------------------------------------------------------------------ mbarriers

constexpr unsigned long long kBarrierMark = 0x7265697272616221ull;  // what an initialised barrier holds in memory

inline Barrier& Hopper::barrier_at(const char* operation, Place place, const void* pointer) {
    const unsigned offset = shared_offset(operation, place, pointer, 8);
    for (Barrier& barrier : barriers) {
        if (barrier.offset != offset) continue;
        if (*static_cast<const unsigned long long*>(pointer) != kBarrierMark + offset)
            fault(operation, place, "uses an mbarrier over which something else was written");
        if (!barrier.fenced && thread_number() != barrier.initialiser)
            fault(operation, place, "uses the mbarrier that was initialised at %s without mbarrier_init_fence after it",
                  text(barrier.initialised).of);
        return barrier;
    }
    fault(operation, place, "uses an mbarrier that is not initialised");
}

inline void Hopper::complete_if_done(Barrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    ++barrier.phase;
    barrier.pending = barrier.arrivals;
    wake_all(0, unsigned(threads.size()), [&](unsigned i) {
        const Wait& wait = threads[i].wait;
        return wait.operation && wait.barrier == &barrier && (barrier.phase & 1) != wait.parity;
    });
}

// ------------------------------------------------------------------------------------------------ warpgroups

HOST_CALL void named_barrier_sync(int id, int count, HERE) {
    const char* const operation = "named_barrier_sync";
    Hopper& hopper = Hopper::get();
    if (id < 1 || id > 15) fault(operation, here, "names barrier %d; 1 to 15 are free (0 is __syncthreads)", id);
    if (count < 32 || count % 32 || size_t(count) > hopper.threads.size())
        fault(operation, here, "is for %d threads; expected a multiple of 32, at most the block's %zu", count, hopper.threads.size());
    NamedBarrier& barrier = hopper.named[id];
    if (barrier.arrived && barrier.threads != count)
        fault(operation, here, "is for %d threads, but others came to barrier %d for %d", count, id, barrier.threads);
    barrier.threads = count;
    if (++barrier.arrived < count) {
        barrier.waiting.insert(thread_number());
        return hopper.wait(operation, here);
    }
    barrier.arrived = 0;
    hopper.wake_all(0, unsigned(hopper.threads.size()), [&](unsigned thread) { return barrier.waiting.erase(thread) == 1; });
}

// The registers that each thread of a block has at first: its share of the 65536, which __launch_bounds__(threads, 1) lets
// the compiler have.
inline int launch_registers(size_t threads) {
    const int most = int(65536 / threads / 8 * 8);
    return most > 256 ? 256 : most;
}

HOST_CALL void set_registers(const char* operation, int registers, bool increase, Place place) {
    Hopper& hopper = Hopper::get();
    if (registers < 24 || registers > 256 || registers % 8)
        fault(operation, place, "asks for %d registers; expected a multiple of 8, 24 to 256", registers);
    const unsigned number = thread_number() / kWarpgroup;
    hopper.gather(operation, place, [&] {
        WarpgroupState& group = hopper.warpgroups[number];
        if (increase ? registers < group.registers : registers > group.registers)
            fault(operation, place, "to %d, but the warpgroup has %d registers per thread", registers, group.registers);
        group.wanted = registers;
        for (unsigned i = 0; i < hopper.warpgroups.size(); ++i) {  // perhaps what it gives back is what others wait for
            const unsigned other = (number + i) % unsigned(hopper.warpgroups.size());
            WarpgroupState& taker = hopper.warpgroups[other];
            if (!taker.wanted || taker.wanted - taker.registers > hopper.free_registers) continue;
            hopper.free_registers -= taker.wanted - taker.registers;
            taker.registers = taker.wanted;
            taker.wanted = 0;
            if (other != number)
                hopper.wake_all(other * kWarpgroup, (other + 1) * kWarpgroup, [](unsigned) { return true; });
        }
        return group.wanted == 0;
    });
}

// ------------------------------------------------------------------------------------------------ the block

inline void Hopper::begin_block() {
    const size_t count = worker->fibers.size();
    barriers.clear();
    loads.clear();
    for (NamedBarrier& barrier : named) barrier = NamedBarrier();
    threads.assign(count, ThreadState());
    for (Fiber& fiber : worker->fibers) fiber.waits_for_engine = false;
    warpgroups.clear();
    warpgroups.resize(count / kWarpgroup);
    for (WarpgroupState& group : warpgroups) group.registers = launch_registers(count);
    free_registers = 0;
    waiting = 0;
    usage.assign(kUnits, Usage());
    view.assign(kSharedLimit, kPoisonByte);
}

// A copy arrives: the oldest one, the youngest one, or any of them.
inline bool Hopper::advance() {
    if (loads.empty() || !waiting) return false;  // all threads at __syncthreads() are no reason
    const int order = worker->launch->order;
    const size_t last = loads.size() - 1;
    arrive(unsigned(order == int(Order::ascending)    ? 0
                    : order == int(Order::descending) ? last
                                                      : worker->next_random() % loads.size()));
    return true;
}

inline void Hopper::report_waits() {
    char message[sizeof(Text)] = "endless wait: nothing is in flight, and";
    auto add = [&](const Text& more) { std::strncat(message, more.of, sizeof message - 1 - std::strlen(message)); };
    std::vector<const Wait*> told;  // the first thread of every kind of wait
    for (size_t i = 0; i < threads.size(); ++i) {
        const Wait& wait = threads[i].wait;
        auto same = [&](const Wait* other) { return other->place.line == wait.place.line && other->barrier == wait.barrier; };
        if (!wait.operation || std::any_of(told.begin(), told.end(), same)) continue;
        add(text("%s thread %s waits in %s at %s", told.empty() ? "" : ";", text(worker->fibers[i].index).of, wait.operation,
                 text(wait.place).of));
        told.push_back(&wait);
        const Barrier* const barrier = wait.barrier;
        if (!barrier) continue;
        const SharedArray* const array = array_at(barrier->offset);
        add(text(" (parity %u of %s[%zu]: phase %llu has %d of %d arrivals and lacks %lld bytes)", wait.parity,
                 array ? array->name : "?", array ? (barrier->offset - array->offset) / 8 : 0, barrier->phase,
                 barrier->arrivals - barrier->pending, barrier->arrivals, barrier->bytes));
    }
    for (const WarpgroupState& group : warpgroups)
        if (group.gathering.arrived)
            add(text("; an incomplete warpgroup: %d of its 128 threads are in %s", group.gathering.arrived, group.gathering.operation));
    worker->fail("%s", message);
}

inline void Hopper::update_view(Place place) {
    typedef unsigned long long word;
    for (const SharedArray& array : worker->shared) {
        const size_t end = array.offset + array.bytes;
        for (size_t at = array.offset / 8 * 8; at < end; at += 8) {
            const word stored = *reinterpret_cast<const word*>(worker->arena_base + at);
            word& seen = *reinterpret_cast<word*>(view.data() + at);
            if (stored == seen) continue;
            const Usage& use = usage[at / kUnit];
            if (use.products || use.load)
                fault("fence_proxy_async", place, "finds that shared array '%s' was overwritten at byte %zu, which %s", array.name,
                      at - array.offset,
                      use.load ? "a copy in flight is writing" : "a product still reads");
            seen = stored;
        }
    }
}

inline void Hopper::end_block() {
    auto report = [](const char* operation, Place place, const char* what) {
        worker->fail("%s at %s %s", operation, text(place).of, what);
    };
    for (const auto& load : loads) return report(load->operation, load->place, "is in flight when the block ends: nobody waits for it");
    for (const WarpgroupState& group : warpgroups)
        for (const auto& product : group.products)
            return report("wgmma", product->place, "is in flight when the block ends: no wgmma_wait covers it");
    for (int i = 1; i < 16; ++i)
        if (named[i].arrived)
            return worker->fail("named barrier %d has %d of %d threads when the block ends", i, named[i].arrived, named[i].threads);
    for (const Barrier& barrier : barriers)
        if (barrier.bytes)
            return report("mbarrier_init", barrier.initialised, "makes a barrier that still expects bytes when the block ends");
}

static const bool hopper_engine = (make_engine = []() -> Engine* { return new Hopper; }, true);

}  // namespace host

#include "host_tma.h"  // copies, which the block advances
