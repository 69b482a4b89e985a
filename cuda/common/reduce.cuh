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

// The sums of COUNT numbers over such a block: partials[block][number].
template <int THREADS, int COUNT>
__device__ void block_store_sums(const double (&own)[COUNT], double* partials) {
    for (int i = 0; i < COUNT; ++i) {
        const double sum = block_sum<THREADS>(own[i]);
        if (threadIdx.x == 0) partials[(int64)blockIdx.x * COUNT + i] = sum;
    }
}

// The sum of `count` numbers `step` apart over such a block: what block_store_sums left of one of its sums. Valid in thread 0.
template <int THREADS>
__device__ double block_total(const double* numbers, int count, int step) {
    double own = 0;
    for (int i = threadIdx.x; i < count; i += THREADS) own += numbers[(int64)i * step];
    return block_sum<THREADS>(own);
}

// The sums of COUNT numbers over threadIdx.y, for each threadIdx.x of a block of COLUMNS x LANES threads; valid everywhere.
template <int LANES, int COLUMNS, int COUNT>
__device__ void block_add_lanes(double (&sums)[COUNT]) {
    SHARED_ARRAY(double, lanes, [COUNT][LANES][COLUMNS]);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) lanes[i][threadIdx.y][threadIdx.x] = sums[i];
    __syncthreads();
    for (int half = LANES / 2; half > 0; half /= 2) {
        if (threadIdx.y < half)
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
                lanes[i][threadIdx.y][threadIdx.x] += lanes[i][threadIdx.y + half][threadIdx.x];
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sums[i] = lanes[i][0][threadIdx.x];
}
