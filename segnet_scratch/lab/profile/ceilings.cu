// The most multiply-adds that the ordinary cores of this GPU do in a second: CHAINS independent sums a thread, so that a
// fused multiply-add never waits for the one before. Tensor cores can do more.
//
// Threads: any number; thread i writes y[i], so that the compiler cannot leave the sums out.
#include "common/types.cuh"

#define CHAINS 8

extern "C" __global__ void multiply_add_ceiling(
    storage_t* __restrict__ y,  // (count)
    int64 count, int rounds) {
    FOR_EACH_INDEX(i, count) {
        accumulate_t sums[CHAINS];
        const accumulate_t factor = (accumulate_t)0.5, term = (accumulate_t)(i % 32);
#pragma unroll
        for (int chain = 0; chain < CHAINS; ++chain) sums[chain] = chain;
        for (int round = 0; round < rounds; ++round)
#pragma unroll
            for (int chain = 0; chain < CHAINS; ++chain) sums[chain] = fma(sums[chain], factor, term);
        accumulate_t total = 0;
        for (int chain = 0; chain < CHAINS; ++chain) total += sums[chain];
        y[i] = total;
    }
}
