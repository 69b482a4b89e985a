// Kernels with one fault each, for the proofs to find and to name. Each should copy x to y, or turn round the 64 elements
// of every block.
#include "common/types.cuh"

#define THREADS 64

// No barrier between writing and reading the first tile.
extern "C" __global__ void faulty_race(
    const storage_t* __restrict__ x,  // (count)
    storage_t* __restrict__ y,        // (count)
    int64 count) {
    SHARED_ARRAY(storage_t, tile, [THREADS]);
    SHARED_ARRAY(storage_t, turned, [THREADS]);
    const int64 i = (int64)blockIdx.x * THREADS + threadIdx.x;
    tile[threadIdx.x] = x[i];
    turned[threadIdx.x] = tile[THREADS - 1 - threadIdx.x];
    __syncthreads();  // line of faulty_race
    y[i] = turned[threadIdx.x];
}

// The last thread of a block never arrives.
extern "C" __global__ void faulty_barrier(
    const storage_t* __restrict__ x,  // (count)
    storage_t* __restrict__ y,        // (count)
    int64 count) {
    const int64 i = (int64)blockIdx.x * THREADS + threadIdx.x;
    y[i] = x[i];
    if (threadIdx.x == THREADS - 1) return;
    __syncthreads();  // line of faulty_barrier
}

// What is read beside x changes nothing in the result.
extern "C" __global__ void faulty_read(
    const storage_t* __restrict__ x,  // (count)
    storage_t* __restrict__ y,        // (count)
    int64 count) {
    FOR_EACH_INDEX(i, count) {
        const storage_t next = x[i + 1];  // line of faulty_read
        y[i] = next > storage_t(1e30) ? storage_t(0) : x[i];
    }
}

extern "C" __global__ void faulty_write(
    const storage_t* __restrict__ x,  // (count)
    storage_t* __restrict__ y,        // (count)
    int64 count) {
    FOR_EACH_INDEX(i, count) {
        y[i] = x[i];
        if (i == count - 1) y[i + 1] = 0;  // line of faulty_write
    }
}

// One element is multiplied by what nobody has set.
extern "C" __global__ void faulty_variable(
    const storage_t* __restrict__ x,  // (count)
    storage_t* __restrict__ y,        // (count)
    int64 count) {
    FOR_EACH_INDEX(i, count) {
        storage_t factor;
        if (i != 3) factor = 1;
        y[i] = x[i] * factor;
    }
}

extern "C" __global__ void faulty_value(
    const storage_t* __restrict__ x,  // (count)
    storage_t* __restrict__ y,        // (count)
    int64 count) {
    FOR_EACH_INDEX(i, count) y[i] = i == 5 ? x[i] + 1 : x[i];
}

extern "C" __global__ void faulty_shift(
    const storage_t* __restrict__ x,  // (count)
    storage_t* __restrict__ y,        // (count)
    int64 count) {
    FOR_EACH_INDEX(i, count) y[i] = (1 << (int)(count + 1)) ? x[i] : x[i];  // line of faulty_shift
}

extern "C" __global__ void faulty_address(
    const storage_t* __restrict__ x,  // (count)
    storage_t* __restrict__ y,        // (count)
    int64 count) {
    FOR_EACH_INDEX(i, count) y[i << 40] = x[i];
}

extern "C" __global__ void faulty_end(
    const storage_t* __restrict__ x,  // (count)
    volatile storage_t* y,            // (count)
    int64 count) {
    while (y[0] != storage_t(12345)) {
    }
}
