// What the 32 threads of a warp do together, on the host device: CUDA's shuffles and votes, and the meeting on which
// these and the tensor-core wrappers (mma.cuh) are built. host_runtime.h includes this file.
//
// Lane l of a warp is the thread whose number in the block, x fastest, is l modulo 32. A warp-wide operation is a
// meeting of the lanes that its mask names: each posts what it brings, the last to arrive does the work for all, then
// all go on. It is a fault when lanes come to a meeting from different lines, with different masks or to do different
// things, when a lane that is named never comes (a GPU lets threads that have returned stay away; here they may not),
// and when a lane asks for the value of one that is not there. Faults name the line of the .cu file: __builtin_LINE()
// as a default argument is the line of the call.
#pragma once

namespace host {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;

[[noreturn]] inline void fault_at(const char* operation, int line, const char* what) {
    Worker* w = worker;
    const uint3 thread = w->current->index;
    char message[384];
    std::snprintf(message, sizeof message, "thread (%u, %u, %u), line %d: %s %s", thread.x, thread.y, thread.z, line,
                  operation, what);
    w->fail(message);
    leave_block(w);
}

// The number in its block of the thread that runs.
inline unsigned thread_number() {
    if (!worker->cooperative) throw NeedsFibers();
    return unsigned(worker->current - worker->fibers.data());
}

// The lanes of its warp that exist: blocks need not be whole warps.
inline unsigned present_lanes() {
    const unsigned left = unsigned(worker->fibers.size()) - thread_number() / 32 * 32;
    return left < 32 ? (1u << left) - 1 : kFullWarp;
}

// The lanes of `mask` do something together: the last to arrive calls carry_out(posts), which has the post of each.
template <class Post, class CarryOut>
void meet(const char* operation, int line, unsigned mask, Post* post, CarryOut carry_out) {
    Worker* const w = worker;
    Fiber* const self = w->current;
    const unsigned thread = thread_number(), lane = thread % 32, warp = thread - lane;
    if (!(mask >> lane & 1)) fault_at(operation, line, "has a mask that does not name the thread itself");
    Meeting* open = nullptr;  // whoever of these lanes has come waits there
    for (unsigned left = mask; left && !open; left &= left - 1) {
        const Fiber& other = w->fibers[warp + unsigned(__builtin_ctz(left))];
        if (other.meeting && other.meeting->mask == mask) open = other.meeting;
    }
    Meeting& meeting = open ? *open : w->meetings[thread];
    if (!open) {
        meeting.operation = operation;
        meeting.line = line;
        meeting.mask = mask;
        meeting.arrived = 0;
    } else if (meeting.line != line || std::strcmp(meeting.operation, operation) != 0) {
        const Fiber& first = w->fibers[warp + unsigned(__builtin_ctz(meeting.arrived))];
        char what[192];
        std::snprintf(what, sizeof what, "and thread (%u, %u, %u), line %d: %s are parts of a divergent warp", first.index.x,
                      first.index.y, first.index.z, meeting.line, meeting.operation);
        fault_at(operation, line, what);
    }
    meeting.posts[lane] = post;
    meeting.arrived |= 1u << lane;
    self->meeting = &meeting;
    if (meeting.arrived == mask) {
        carry_out(reinterpret_cast<Post* const*>(meeting.posts));
        const size_t before = w->ready.size();
        for (unsigned i = 0; i < 32; ++i) {  // the last one pushed runs first
            const unsigned other = w->launch->order == int(Order::descending) ? i : 31 - i;
            if (!(mask >> other & 1)) continue;
            w->fibers[warp + other].meeting = nullptr;
            w->ready.push_back(warp + other);
        }
        if (w->launch->order == int(Order::shuffled))
            for (size_t i = w->ready.size() - before; i > 1; --i)
                std::swap(w->ready[before + i - 1], w->ready[before + w->next_random() % i]);
    }
    pass_on(w);
}

// A meeting of all 32 lanes, for instructions that take no fewer.
template <class Post, class CarryOut>
void meet_full_warp(const char* instruction, int line, Post* post, CarryOut carry_out) {
    if (present_lanes() != kFullWarp) fault_at(instruction, line, "takes a warp of 32 threads; the block has no more");
    meet(instruction, line, kFullWarp, post, carry_out);
}

template <class T>
struct Shuffle {
    T value, received;
    unsigned source;  // lane
};

// Every lane of `mask` posts a value and receives that of a lane; `source` is no lane: its own.
template <class T>
T shuffle(const char* operation, int line, unsigned mask, T value, int source) {
    mask &= present_lanes();
    const unsigned lane = source < 0 ? thread_number() % 32 : unsigned(source);
    if (!(mask >> lane & 1)) {
        char what[96];
        std::snprintf(what, sizeof what, "reads lane %u, which its mask 0x%08x does not name", lane, mask);
        fault_at(operation, line, what);
    }
    Shuffle<T> post{value, T(), lane};
    meet(operation, line, mask, &post, [mask](Shuffle<T>* const* lanes) {
        for (unsigned i = 0; i < 32; ++i)
            if (mask >> i & 1) lanes[i]->received = lanes[lanes[i]->source]->value;
    });
    return post.received;
}

struct Vote {
    bool value;
    unsigned ballot;
};

inline unsigned vote(const char* operation, int line, unsigned mask, bool value) {
    mask &= present_lanes();
    Vote post{value, 0};
    meet(operation, line, mask, &post, [mask](Vote* const* lanes) {
        unsigned ballot = 0;
        for (unsigned i = 0; i < 32; ++i)
            if (mask >> i & 1) ballot |= unsigned(lanes[i]->value) << i;
        for (unsigned i = 0; i < 32; ++i)
            if (mask >> i & 1) lanes[i]->ballot = ballot;
    });
    return post.ballot;
}

}  // namespace host

// `width` cuts the warp into parts of that many lanes, a power of two; lanes are counted from the start of the part.
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, int line = __builtin_LINE()) {
    const int self = int(::host::thread_number() % 32), first = self & -width;
    return ::host::shuffle("__shfl_sync", line, mask, value, first + (lane & (width - 1)));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
    const int self = int(::host::thread_number() % 32), source = self - int(delta);
    return ::host::shuffle("__shfl_up_sync", line, mask, value, source >= (self & -width) ? source : -1);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
    const int self = int(::host::thread_number() % 32), source = self + int(delta);
    return ::host::shuffle("__shfl_down_sync", line, mask, value, source < (self & -width) + width ? source : -1);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, int line = __builtin_LINE()) {
    const int self = int(::host::thread_number() % 32), source = self ^ bits;
    return ::host::shuffle("__shfl_xor_sync", line, mask, value, source < (self & -width) + width ? source : -1);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return ::host::vote("__ballot_sync", line, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return ::host::vote("__any_sync", line, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return ::host::vote("__all_sync", line, mask, predicate == 0) == 0;
}
inline void __syncwarp(unsigned mask = ::host::kFullWarp, int line = __builtin_LINE()) {
    ::host::vote("__syncwarp", line, mask, false);
}
