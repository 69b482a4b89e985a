// Barriers that not all threads of a block reach.
#include "common/types.cuh"

extern "C" __global__ void barrier_skipped(
    int* out,  // (1)
    int first_that_returns, int block) {
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    if (blockIdx.x == block && thread >= first_that_returns) return;
    __syncthreads();  // line of barrier_skipped
    if (thread == 0 && blockIdx.x == 0) out[0] = 1;
}

extern "C" __global__ void barrier_two_lines(
    int* out,  // (1)
    int first_of_others) {
    if (threadIdx.x >= first_of_others)
        __syncthreads();  // upper line
    else
        __syncthreads();  // lower line
    if (threadIdx.x == 0) out[0] = 1;
}
