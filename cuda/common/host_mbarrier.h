// Barriers in shared memory on the host device: the instructions of mbarrier.cuh, whose Mbarrier stands for a host::Barrier.
#pragma once
#include "host_hopper.h"

namespace host {

HOST_CALL void mbarrier_init(Mbarrier& barrier, int arrivals, HERE) {
    const char* const operation = "mbarrier_init";
    Hopper& hopper = Hopper::get();
    const unsigned offset = shared_offset(operation, here, &barrier, 8);
    if (arrivals < 1 || arrivals >= 1 << 20) fault(operation, here, "announces %d arrivals; 1 to 2^20 - 1 are possible", arrivals);
    for (const Barrier& other : hopper.barriers)
        if (other.offset == offset) fault(operation, here, "initialises an mbarrier that is in use");
    barrier.state = kBarrierMark + offset;
    hopper.barriers.push_back({offset, here, thread_number(), false, arrivals, arrivals, 0, 0});
}

inline void mbarrier_init_fence() {
    for (Barrier& barrier : Hopper::get().barriers)
        if (barrier.initialiser == thread_number()) barrier.fenced = true;
}

HOST_CALL void arrive(const char* operation, const Mbarrier& shared, long long bytes, Place place) {
    Hopper& hopper = Hopper::get();
    Barrier& barrier = hopper.barrier_at(operation, place, &shared);
    if (bytes < 0 || bytes >= 1 << 20) fault(operation, place, "announces %lld bytes; 0 to 2^20 - 1 are possible", bytes);
    if (barrier.pending == 0)
        fault(operation, place, "comes after the %d arrivals of the phase, of which %lld bytes are still to come", barrier.arrivals,
              barrier.bytes);
    barrier.bytes += bytes;
    --barrier.pending;
    if (barrier.pending == 0 && barrier.bytes < 0)
        fault(operation, place, "completes the arrivals of a phase to which %lld bytes more were copied than announced", -barrier.bytes);
    hopper.complete_if_done(barrier);
    hopper.maybe_early();
}

inline void mbarrier_arrive(Mbarrier& barrier, HERE) { arrive("mbarrier_arrive", barrier, 0, here); }
inline void mbarrier_arrive_expect_tx(Mbarrier& barrier, int bytes, HERE) {
    arrive("mbarrier_arrive_expect_tx", barrier, bytes, here);
}

HOST_CALL void mbarrier_wait(const Mbarrier& shared, unsigned parity, HERE) {
    const char* const operation = "mbarrier_wait";
    Hopper& hopper = Hopper::get();
    const Barrier* barrier = &hopper.barrier_at(operation, here, &shared);
    if (parity > 1) fault(operation, here, "waits for parity %u; it is 0 or 1", parity);
    hopper.maybe_early();
    if ((barrier->phase & 1) != parity) return;
    const unsigned long long phase = barrier->phase;
    hopper.wait(operation, here, barrier, parity);
    if (barrier->phase > phase + 1)
        fault(operation, here, "misses a phase: %llu were completed before this thread saw that the first of them was",
              barrier->phase - phase);
}

}  // namespace host

using host::mbarrier_init, host::mbarrier_init_fence, host::mbarrier_wait;
using host::mbarrier_arrive, host::mbarrier_arrive_expect_tx;
