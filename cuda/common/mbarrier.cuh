// Barriers in shared memory that threads and asynchronous copies arrive at (Hopper: PTX's mbarrier).
//
// An mbarrier counts phases. A phase is complete when as many arrivals as mbarrier_init announced have come and as many
// bytes as were expected have been copied; then the next phase begins by itself, with the same number of arrivals. One
// waits for a phase by its parity, 0 for the first, 1 for the second, 0 for the third: mbarrier_wait(barrier, parity)
// returns when the phase that goes on is of the other parity. So on a fresh barrier, waiting for parity 1 is no wait.
//
//   SHARED_ARRAY(Mbarrier, full, [STAGES]);
//   mbarrier_init(full[i], arrivals);                by one thread; then, by the same one,
//   mbarrier_init_fence();                           and a __syncthreads() before anybody uses them
//   mbarrier_arrive(empty[i]);                       one arrival
//   mbarrier_arrive_expect_tx(full[i], bytes);       one arrival, which announces that `bytes` will be copied
//   mbarrier_wait(full[i], parity);                  waits, and sees what was written before the arrivals
//
// A ring of stages is two arrays of them: a producer waits for empty[stage] and fills the stage, consumers wait for
// full[stage] and release it by an arrival at empty[stage]. Each of them keeps a RingPosition: the stage, and the parity
// that `full` has when the stage is full. The producer waits for the parity before: position.parity ^ 1, which at first
// is no wait.
#pragma once
#include "warpgroup.cuh"

struct __align__(8) Mbarrier {
    uint64 state;
};

template <int STAGES>
struct RingPosition {
    int stage = 0;
    unsigned parity = 0;

    __device__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

#ifdef SEGNET_HOST
#include "host_mbarrier.h"
#else

__device__ inline void mbarrier_init(Mbarrier& barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
__device__ inline void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void mbarrier_arrive(Mbarrier& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
__device__ inline void mbarrier_arrive_expect_tx(Mbarrier& barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
                 : "memory");
}

__device__ inline void mbarrier_wait(Mbarrier& barrier, unsigned parity) {
    unsigned complete;
    do {
        asm volatile(
            "{\n"
            ".reg .pred complete;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
            "selp.u32 %0, 1, 0, complete;\n"
            "}"
            : "=r"(complete)
            : "r"(shared_address(&barrier)), "r"(parity)
            : "memory");
    } while (!complete);
}

#endif
