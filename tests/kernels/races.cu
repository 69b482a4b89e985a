// Sums of a block with and without a race.
#include "common/reduce.cuh"

#define THREADS 64

extern "C" __global__ void sum_correct(
    const storage_t* x,  // (blocks, 64)
    storage_t* y,        // (blocks)
    int blocks) {
    const storage_t total = block_sum<THREADS>(x[blockIdx.x * THREADS + threadIdx.x]);
    if (threadIdx.x == 0) y[blockIdx.x] = total;
}

// The barrier between the levels of the tree is missing.
extern "C" __global__ void sum_racy(
    const storage_t* x,  // (blocks, 64)
    storage_t* y,        // (blocks)
    int blocks) {
    SHARED_ARRAY(storage_t, lanes, [THREADS]);
    lanes[threadIdx.x] = x[blockIdx.x * THREADS + threadIdx.x];
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2)
        if (threadIdx.x < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
    __syncthreads();
    if (threadIdx.x == 0) y[blockIdx.x] = lanes[0];
}
