// A barrier behind a macro of the same file.
#include "common/types.cuh"

#define MEET() \
    __syncthreads()

extern "C" __global__ void macro_barrier(
    int* counter,  // (1)
    int* out,      // (threads)
    int threads) {
    atomicAdd(counter, 1);
    MEET();
    out[threadIdx.x] = counter[0];
}
