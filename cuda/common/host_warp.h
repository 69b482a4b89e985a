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

// What kernels call again and again, in every unrolled step: inlined it would cost seconds of compilation.
#define HOST_CALL inline __attribute__((noinline))

// Ends the block: what the thread that runs does there is wrong.
template <class... Details>
[[noreturn]] void fault(const char* operation, Place here, const char* format, Details... details) {
    worker->fail("thread %s, %s: %s %s", text(worker->current->index).of, text(here).of, operation, text(format, details...).of);
    leave_block(worker);
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
void meet(const char* operation, Place here, unsigned mask, Post* post, CarryOut carry_out) {
    Worker* const w = worker;
    Fiber* const self = w->current;
    const unsigned thread = thread_number(), lane = thread % 32, warp = thread - lane;
    if (!(mask >> lane & 1)) fault(operation, here, "has a mask that does not name the thread itself");
    Meeting* open = nullptr;  // whoever of these lanes has come waits there
    for (unsigned left = mask; left && !open; left &= left - 1) {
        const Fiber& other = w->fibers[warp + unsigned(__builtin_ctz(left))];
        if (other.meeting && other.meeting->mask == mask) open = other.meeting;
    }
    Meeting& meeting = open ? *open : w->meetings[thread];
    if (!open) {
        meeting.operation = operation;
        meeting.place = here;
        meeting.mask = mask;
        meeting.arrived = 0;
    } else if (meeting.place.line != here.line || std::strcmp(meeting.operation, operation) != 0) {
        const Fiber& first = w->fibers[warp + unsigned(__builtin_ctz(meeting.arrived))];
        fault(operation, here, "and thread %s, %s: %s are parts of a divergent warp", text(first.index).of,
              text(meeting.place).of, meeting.operation);
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
        if (w->launch->order == int(Order::shuffled)) w->shuffle(w->ready, before);
    }
    pass_on(w);
}

// A meeting of all 32 lanes, for instructions that take no fewer.
template <class Post, class CarryOut>
void meet_full_warp(const char* instruction, Place here, Post* post, CarryOut carry_out) {
    if (present_lanes() != kFullWarp) fault(instruction, here, "takes a warp of 32 threads; the block has no more");
    meet(instruction, here, kFullWarp, post, carry_out);
}

template <class T>
struct Shuffle {
    T value, received;
    unsigned source;  // lane
};

// Every lane of `mask` posts a value and receives that of a lane; `source` is no lane: its own.
template <class T>
T shuffle(const char* operation, Place here, unsigned mask, T value, int source) {
    mask &= present_lanes();
    const unsigned lane = source < 0 ? thread_number() % 32 : unsigned(source);
    if (!(mask >> lane & 1)) fault(operation, here, "reads lane %u, which its mask 0x%08x does not name", lane, mask);
    Shuffle<T> post{value, T(), lane};
    meet(operation, here, mask, &post, [mask](Shuffle<T>* const* lanes) {
        for (unsigned i = 0; i < 32; ++i)
            if (mask >> i & 1) lanes[i]->received = lanes[lanes[i]->source]->value;
    });
    return post.received;
}

struct Vote {
    bool value;
    unsigned ballot;
};

inline unsigned vote(const char* operation, Place here, unsigned mask, bool value) {
    mask &= present_lanes();
    Vote post{value, 0};
    meet(operation, here, mask, &post, [mask](Vote* const* lanes) {
        unsigned ballot = 0;
        for (unsigned i = 0; i < 32; ++i)
            if (mask >> i & 1) ballot |= unsigned(lanes[i]->value) << i;
        for (unsigned i = 0; i < 32; ++i)
            if (mask >> i & 1) lanes[i]->ballot = ballot;
    });
    return post.ballot;
}

}  // namespace host

// `width` cuts the warp into parts of that many lanes, a power of two; `first` is the first of the part. A thread receives
// the value of `lane`, or its own where that does not exist.
#define HOST_SHUFFLE(name, Amount, lane_, exists)                                  \
    template <class T>                                                             \
    T name(unsigned mask, T value, Amount amount, int width = 32, HERE) {          \
        const int self = int(::host::thread_number() % 32), first = self & -width; \
        const int lane = lane_;                                                    \
        return ::host::shuffle(#name, here, mask, value, exists ? lane : -1);      \
    }
HOST_SHUFFLE(__shfl_sync, int, first + (amount & (width - 1)), true)
HOST_SHUFFLE(__shfl_up_sync, unsigned, self - int(amount), lane >= first)
HOST_SHUFFLE(__shfl_down_sync, unsigned, self + int(amount), lane < first + width)
HOST_SHUFFLE(__shfl_xor_sync, int, self ^ amount, lane < first + width)
inline unsigned __ballot_sync(unsigned mask, int predicate, HERE) {
    return ::host::vote("__ballot_sync", here, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate, HERE) {
    return ::host::vote("__any_sync", here, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, HERE) {
    return ::host::vote("__all_sync", here, mask, predicate == 0) == 0;
}
inline void __syncwarp(unsigned mask = ::host::kFullWarp, HERE) { ::host::vote("__syncwarp", here, mask, false); }
