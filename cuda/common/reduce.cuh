// Sums over the threads of a block, in an order that never changes: a binary tree over the thread index.
// Every thread of the block must call these (they contain barriers).
#pragma once
#include "types.cuh"

// The sum of `value` over the first THREADS threads of a one-dimensional block; valid in thread 0.
template <int THREADS, class T>
__device__ T block_sum(T value) {
    SHARED_ARRAY(T, lanes, [THREADS]);
    lanes[threadIdx.x] = value;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
        __syncthreads();
    }
    const T total = lanes[0];
    __syncthreads();  // a second call writes `lanes` again
    return total;
}
